"""The body of an HTTP answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from rankload._fetch.origins.http_errors import wrap_http_errors
from rankload._fetch.origins.origin import Version

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
    _display_name: str
    _read1: Callable[[int], bytes]
    _shut_down: Callable[[], None]

    def read(self) -> bytes:
        """See `Body`. A body in chunks that ends early is a TruncatedError."""
        with wrap_http_errors(self._display_name):
            return self._read1(_READ_BYTES)

    def break_off(self) -> None:
        """See `Body`."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # the body has ended already
            self._shut_down()
