"""Starts writing dirty pages to disk while a download runs, so that the final fsync finds little to do."""

from __future__ import annotations

import ctypes
import sys

_STEP_BYTES = 32 << 20

#: Start writing the dirty pages of the range, and do not wait: sync_file_range(2).
_SYNC_FILE_RANGE_WRITE = 2


class Writeback:
    """Call `advance` with the number of bytes written so far, in order."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._started = descriptor, 0

    def advance(self, written: int) -> None:
        """Start the writeback of what was written since the last step."""
        if written - self._started >= _STEP_BYTES:
            _start(self._descriptor, self._started, written - self._started)
            self._started = written


def _start(descriptor: int, offset: int, length: int) -> None:
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)  # a failure costs only time


def _find_sync_file_range() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        function.restype = ctypes.c_int
    return function


_sync_file_range = _find_sync_file_range()
