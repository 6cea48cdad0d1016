"""Ranges of a file on whatever fsspec reaches: s3, gs, hf, memory, …"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec

from rankload._cache.layout import redact
from rankload._errors import ContentChangedError, FetchError, NetworkError
from rankload._fetch.origins.origin import Claim, Version

#: One read. Every one is a request of its own, so it should not be small.
_READ_BYTES = 8 << 20

#: The package that a scheme needs, and the extra of ours that brings it.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}


class FilesystemOrigin:
    """A file at an fsspec URL. Credentials and endpoints are for fsspec to find, as it always does."""

    def __init__(self, url: str) -> None:
        self.url, self.shown = url, redact(url)

    def close(self) -> None:
        """See `Origin`. fsspec keeps its filesystems for the life of the process."""

    @contextlib.contextmanager
    def open(self, begin: int, end: int | None, version: Version | None) -> Iterator[FilesystemBody]:
        """See `Origin`."""
        with self._translating():
            filesystem, path = self._found
            found = _version_of(filesystem, path)
        if version is not None and not version.is_same_as(found):
            raise ContentChangedError(f"{self.shown}: the file has changed while it was fetched", url=self.shown)
        size_bytes = found.size_bytes
        if end is None or size_bytes is None or begin >= size_bytes:
            with self._translating(), filesystem.open(path, "rb") as file:
                yield FilesystemBody(found, 0, size_bytes, True, self, lambda _, count: file.read(count))
        else:
            read = functools.partial(_read_range, filesystem, path)
            yield FilesystemBody(found, begin, min(end, size_bytes), False, self, read)

    @functools.cached_property
    def _found(self) -> tuple[Any, str]:
        filesystem, path = fsspec.core.url_to_fs(self.url)
        return filesystem, path

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Translate whatever a filesystem raises; each has its own kinds of errors."""
        try:
            yield
        except FetchError:
            raise
        except FileNotFoundError:
            raise FetchError(f"{self.shown}: no such file there; check the URL", url=self.shown) from None
        except PermissionError as error:
            raise FetchError(f"{self.shown}: access denied: {error}", url=self.shown) from None
        except (ImportError, ValueError) as error:
            scheme = self.url.partition("://")[0]
            advice = f"; pip install 'rankload[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
            raise FetchError(f"{self.shown}: {error}{advice}", url=self.shown) from None
        except Exception as error:
            raise NetworkError(f"{self.shown}: {type(error).__name__}: {error}", url=self.shown) from None


@dataclass
class FilesystemBody:
    """See `Body`."""

    version: Version
    begin: int
    end: int | None
    is_whole: bool
    _origin: FilesystemOrigin
    _read: Callable[[int, int], bytes]
    _position: int = field(init=False)

    def __post_init__(self) -> None:
        self._position = self.begin

    def read(self) -> bytes:
        """See `Body`."""
        count = _READ_BYTES if self.end is None else min(_READ_BYTES, self.end - self._position)
        with self._origin._translating():
            piece = self._read(self._position, count) if count > 0 else b""
        self._position += len(piece)
        return piece

    def break_off(self) -> None:
        """See `Body`. No filesystem can: the read ends when it ends, and nobody waits for it."""


def _read_range(filesystem: Any, path: str, begin: int, count: int) -> bytes:
    return filesystem.cat_file(path, start=begin, end=begin + count)  # type: ignore[no-any-return]


def _version_of(filesystem: Any, path: str) -> Version:
    filesystem.invalidate_cache()  # listings of earlier looks: an object may have been replaced since
    found = filesystem.info(path)
    if found.get("type") == "directory":
        raise FileNotFoundError(path)
    size = found.get("size")
    return Version(
        size_bytes=int(size) if size is not None else None,
        etag=str(found.get("ETag") or found.get("etag") or filesystem.ukey(path)),
        claim=_claim_of(found),
    )


def _claim_of(found: Mapping[str, Any]) -> Claim | None:
    """Return the SHA-256 that the Hugging Face Hub tells of a file in its large-file storage."""
    large = found.get("lfs")
    digest = large.get("sha256") if isinstance(large, Mapping) else getattr(large, "sha256", None)
    return Claim(digest, "hf-lfs") if isinstance(digest, str) and len(digest) == 64 else None
