"""Random access to a file at an origin, for callers that need few of its bytes: a checkpoint's index, one tensor."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from types import TracebackType

from typing_extensions import override

from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.origins.credentials import Headers
from rankload._fetch.origins.origin import UnusableRange, Version
from rankload._fetch.origins.registry import origin_for
from rankload._formats.source import Source
from rankload._settings import Settings
from rankload._urls import Url
from rankload.errors import FetchError

#: Least number of bytes to request. Surplus bytes are kept: the next read is often close by.
_MIN_BYTES = 32 << 10

#: Most bytes to keep. Tensors come after that, and are seldom read twice.
_MAX_KEPT_BYTES = 4 << 20

_FETCH_IT = "fetch it with dist_fetch, and open the file"


class RemoteSource(Source):
    """Random access to a file at an origin. Use as a context manager. Writes nothing to disk.

    Args:
        url: URL of the file.
        headers: the caller's headers, for the URL's server.
        settings: deadlines and retries.

    Attributes:
        size_bytes: length of the file.

    Raises:
        FetchTimeoutError: a deadline passed (see `read_bounded`).
        FetchError: the origin does not serve a range of the file, or does not give its length.
    """

    def __init__(self, url: Url, headers: Headers, settings: Settings) -> None:
        self._settings = settings
        self._new_origin = functools.partial(origin_for, url, headers, settings)
        self._origin = self._new_origin()
        self.size_bytes = 0
        self._version: Version | None = None
        self._serves_whole = False
        self._kept: dict[int, bytes] = {}
        with ExitStack() as unless_asked:
            unless_asked.callback(self.close)
            self._kept[0] = self._fetch(0, _MIN_BYTES)
            size_bytes = self._version.size_bytes if self._version is not None else None
            if size_bytes is None:
                display_name = self._origin.display_name
                raise FetchError(
                    f"{display_name}: the origin does not give the file's length; {_FETCH_IT}", url=display_name
                )
            self.size_bytes = size_bytes
            unless_asked.pop_all()

    @override
    def read(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from an offset on; fewer only at the end of the file.

        Raises:
            ContentChangedError: the file changed since the first read.
            FetchTimeoutError: a deadline passed (see `read_bounded`).
            FetchError: the origin does not serve the bytes.
        """
        end = min(offset + length, self.size_bytes)
        if offset >= end:
            return b""
        for begin, piece in self._kept.items():
            if begin <= offset and end <= begin + len(piece):
                return piece[offset - begin : end - begin]
        piece = self._fetch(offset, min(max(end, offset + _MIN_BYTES), self.size_bytes))
        if sum(map(len, self._kept.values())) + len(piece) <= _MAX_KEPT_BYTES:
            self._kept[offset] = piece
        return piece[: end - offset]

    def close(self) -> None:
        """Close all connections."""
        self._origin.close()

    def __enter__(self) -> RemoteSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _fetch(self, begin: int, end: int) -> bytes:
        display_name = self._origin.display_name
        if self._serves_whole:
            raise FetchError(
                f"{display_name}: the origin serves only the whole file, no ranges; {_FETCH_IT}", url=display_name
            )
        try:
            answer = read_bounded(
                self._origin, begin, end, self._version, most_bytes=end - begin, settings=self._settings
            )
        except UnusableRange as error:
            raise FetchError(f"{error}; {_FETCH_IT}", url=display_name) from None
        except BaseException:  # a request may still be running on a thread that was left behind
            self._origin.close()
            self._origin = self._new_origin()
            raise
        self._version = self._version or answer.version
        self._serves_whole = answer.is_whole
        return answer.content
