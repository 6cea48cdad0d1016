"""The body of an HTTP answer: read, or moved within the kernel."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass

import requests

from rankload._fetch.origins.origin import Version
from rankload._fetch.origins.splice import can_splice, splice_from
from rankload._fetch.origins.translation import translating

#: One read from the socket. Small enough to lie in a core's second-level cache (1 MiB, and less) from the copy out of
#: the socket to the copy into the page cache: with 1 MiB a fetch of 1 GB took 2.0 s, with 256 KiB 1.1 s.
_READ_BYTES = 256 << 10


@dataclass
class HttpBody:
    """See `Body`."""

    version: Version
    begin: int
    end: int | None
    is_whole: bool
    _shown: str
    _read1: Callable[[int], bytes]
    _shut_down: Callable[[], None]
    _socket: socket.socket | None
    _is_buffer_empty: bool = False

    @property
    def can_splice(self) -> bool:
        """See `Body`."""
        return self._socket is not None

    def read(self) -> bytes:
        """See `Body`. A body in chunks that ends early is a TruncatedError."""
        with translating(self._shown):
            piece = self._read1(_READ_BYTES)
        self._is_buffer_empty = True  # what had come with the head is shorter than that, and is given out at once
        return piece

    def splice(self, pipe: int, count: int) -> int | None:
        """See `Body`. After it `read` would begin in the wrong place."""
        if self._socket is None or not self._is_buffer_empty:
            return None
        with translating(self._shown):
            count_or_none = splice_from(self._socket, pipe, count)
        if count_or_none is None:
            self._socket = None
        return count_or_none

    def break_off(self) -> None:
        """See `Body`."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # the body has ended already
            self._shut_down()


def plain_socket(response: requests.Response) -> socket.socket | None:
    """Return the socket that the body comes out of as it is: no TLS, no proxy that wraps it, no chunks."""
    found = getattr(response.raw.connection, "sock", None)
    is_plain = type(found) is socket.socket and not response.raw.chunked
    return found if is_plain and can_splice() else None
