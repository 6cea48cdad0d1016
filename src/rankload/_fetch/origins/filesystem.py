"""The origin for all schemes that fsspec supports: s3, gs, memory, …"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
from typing_extensions import override

from rankload._fetch.origins.http_errors import raise_alone
from rankload._fetch.origins.origin import Body, NotModified, Origin, Version
from rankload._urls import Url, redact_text
from rankload.errors import ContentChangedError, FetchError, NetworkError

#: Size of one read. Every read is a separate request, so it should not be small.
_READ_BYTES = 8 << 20

#: rankload's extra that installs the package for a scheme.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}

#: Errors of botocore and google-auth, by name, as neither need be installed. A retry would not find credentials either.
_WITHOUT_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})


class FilesystemOrigin(Origin):
    """A file at an fsspec URL. fsspec itself finds credentials and endpoints."""

    def __init__(self, url: Url) -> None:
        self.url, self.display_name, self.may_answer_once = url, url.display_name, False

    @override
    def close(self) -> None:
        """Do nothing: fsspec keeps its filesystems for the life of the process."""

    @override
    @contextlib.contextmanager
    def open(
        self, begin: int, end: int | None, version: Version | None, *, unless: Version | None = None
    ) -> Iterator[FilesystemBody]:
        found = self.check_version(version)
        if unless is not None and unless.is_same_as(found):
            raise NotModified(self.display_name)
        filesystem, path = self._found
        size_bytes = found.size_bytes
        if end is None or size_bytes is None or begin >= size_bytes:
            with wrap_any_errors(self.url.raw, self.display_name), filesystem.open(path, "rb") as file:
                yield FilesystemBody(found, 0, size_bytes, True, self, lambda _, count: file.read(count))
        else:
            read = functools.partial(_read_range, filesystem, path)
            yield FilesystemBody(found, begin, min(end, size_bytes), False, self, read)

    def check_version(self, expected: Version | None) -> Version:
        """Request the file's present version.

        Raises:
            ContentChangedError: the version differs from ``expected``.
            FetchError: the filesystem failed, or did not answer.
        """
        with wrap_any_errors(self.url.raw, self.display_name):
            found = _version_of(*self._found)
        if expected is not None and not expected.is_same_as(found):
            raise ContentChangedError(
                f"{self.display_name}: the file changed while it was fetched", url=self.display_name
            )
        return found

    @functools.cached_property
    def _found(self) -> tuple[Any, str]:
        return filesystem_of(self.url.raw)


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem for a URL, and the path in it."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


@contextlib.contextmanager
def wrap_any_errors(url: str, display_name: str) -> Iterator[None]:
    """Translate any error of a filesystem; each filesystem has its own error classes.

    The original errors may hold the whole URL, or a request with its headers. So the new error is not chained to them,
    as in `wrap_http_errors`.
    """
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        raise_alone(_translated(error, url, display_name))


def _translated(error: Exception, url: str, display_name: str) -> FetchError:
    text = redact_text(str(error), url)
    if isinstance(error, FileNotFoundError):
        return FetchError(f"{display_name}: no such file there; check the URL", url=display_name)
    if isinstance(error, PermissionError):
        return FetchError(f"{display_name}: access denied: {text}", url=display_name)
    if isinstance(error, (ImportError, ValueError)):
        scheme = url.partition("://")[0]
        advice = f"; pip install 'rankload[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        return FetchError(f"{display_name}: {text}{advice}", url=display_name)
    if type(error).__name__ in _WITHOUT_CREDENTIALS:
        return FetchError(f"{display_name}: no credentials for this URL: {text}", url=display_name)
    return NetworkError(f"{display_name}: {type(error).__name__}: {text}", url=display_name)


@dataclass
class FilesystemBody(Body):
    """The bytes of a file on an fsspec filesystem, from one offset to another."""

    version: Version
    begin: int
    end: int | None
    is_whole: bool
    _origin: FilesystemOrigin
    _read: Callable[[int, int], bytes]
    _position: int = field(init=False)

    def __post_init__(self) -> None:
        self._position = self.begin

    @override
    def read(self) -> bytes:
        count = _READ_BYTES if self.end is None else min(_READ_BYTES, self.end - self._position)
        with wrap_any_errors(self._origin.url.raw, self._origin.display_name):
            piece = self._read(self._position, count) if count > 0 else b""
        self._position += len(piece)
        is_at_end = self._position == self.end
        if is_at_end if piece else not is_at_end:  # the last piece, or the file ended early
            # a read names no version: the bytes may be of one that is newer than `version`
            self._origin.check_version(self.version)
        return piece

    @override
    def break_off(self) -> None:
        """Do nothing: fsspec cannot break a read off. The caller leaves its thread behind."""


def _read_range(filesystem: Any, path: str, begin: int, count: int) -> bytes:
    return filesystem.cat_file(path, start=begin, end=begin + count)  # type: ignore[no-any-return]


def _version_of(filesystem: Any, path: str) -> Version:
    filesystem.invalidate_cache()  # drop earlier listings: an object may have been replaced since
    found = filesystem.info(path)
    if found.get("type") == "directory":
        raise FileNotFoundError(path)
    size = found.get("size")
    return Version(
        size_bytes=int(size) if size is not None else None,
        etag=str(found.get("ETag") or found.get("etag") or filesystem.ukey(path)),
    )
