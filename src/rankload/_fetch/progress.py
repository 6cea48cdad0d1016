"""Show a download's progress on stderr: a bar on a terminal, else occasional lines, or nothing."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from tqdm import tqdm

from rankload._fetch.progress_bar import ProgressBar

_logger = logging.getLogger("rankload")

#: Duration from which a download is announced; a shorter one is not.
_QUIET_SECONDS = 1.0

#: Shows the number of bytes done, and of all bytes (None: unknown).
Show = Callable[[int, int | None], None]


@contextmanager
def open_progress(
    file_name: str, url: str, initial_bytes: int, interval_seconds: float, *, is_wanted: bool
) -> Iterator[Show]:
    """Yield a function that a download calls repeatedly to show its progress.

    Args:
        file_name: name of the file in the cache.
        url: URL of the file, without secrets.
        initial_bytes: number of bytes that an earlier download left.
        interval_seconds: time between two lines.
        is_wanted: False shows nothing.
    """
    if not is_wanted or sys.stderr is None:
        yield _show_nothing
    elif sys.stderr.isatty():
        with ProgressBar(file_name, initial_bytes) as bar:
            yield bar.show
    else:
        with ProgressLines(file_name, url, initial_bytes, interval_seconds) as lines:
            yield lines.show


class ProgressLines:
    """Writes a line at the start, one per interval, and one at the end.

    A download that takes less than a second has only the last line.

    Args:
        file_name: name of the file in the cache.
        url: URL of the file, without secrets.
        initial_bytes: number of bytes that an earlier download left.
        interval_seconds: time between two lines.
        clock: monotonic clock, in seconds.
        write: writes a line; default: to the log or stderr.
    """

    def __init__(
        self,
        file_name: str,
        url: str,
        initial_bytes: int,
        interval_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self._file_name, self._url, self._interval_seconds = file_name, url, interval_seconds
        self._clock, self._write = clock, write or _write
        self._began_at = self._written_at = clock()
        self._initial_bytes = self._done_bytes = initial_bytes
        self._is_announced = False

    def __enter__(self) -> ProgressLines:
        return self

    def show(self, done_bytes: int, total_bytes: int | None) -> None:
        """Record the number of bytes done, and write a line when one is due."""
        now = self._clock()
        if not self._is_announced and now - self._began_at >= min(_QUIET_SECONDS, self._interval_seconds):
            self._is_announced = True
            there = f" ({_size(self._initial_bytes)} are here already)" if self._initial_bytes else ""
            self._write(f"downloading {self._url}{there}")
        if done_bytes < self._done_bytes:  # the download starts over
            self._initial_bytes, self._began_at = 0, now
        self._done_bytes = done_bytes
        if now - self._written_at >= self._interval_seconds:
            self._written_at = now
            self._write(f"{self._file_name}: {self._amount(total_bytes)}, {self._rate_and_rest(now, total_bytes)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            seconds = self._clock() - self._began_at
            rate = self._rate(self._clock())
            self._write(f"{self._file_name}: {_size(self._done_bytes)} in {seconds:.1f} s, {_size(rate)}/s")

    def _amount(self, total_bytes: int | None) -> str:
        if not total_bytes:
            return _size(self._done_bytes)
        return f"{_size(self._done_bytes)} of {_size(total_bytes)} ({self._done_bytes / total_bytes:.0%})"

    def _rate_and_rest(self, now: float, total_bytes: int | None) -> str:
        rate = self._rate(now)
        left = f", {tqdm.format_interval((total_bytes - self._done_bytes) / rate)} left" if total_bytes and rate else ""
        return f"{_size(rate)}/s{left}"

    def _rate(self, now: float) -> float:
        seconds = now - self._began_at
        return (self._done_bytes - self._initial_bytes) / seconds if seconds > 0 else 0.0


def _size(count: float) -> str:
    return f"{tqdm.format_sizeof(count)}B"


def _show_nothing(done_bytes: int, total_bytes: int | None) -> None:
    pass


def _write(line: str) -> None:
    """Log a line if the application logs rankload at INFO; else write it to stderr, as tqdm does."""
    if _logger.isEnabledFor(logging.INFO) and _logger.hasHandlers():
        _logger.info("%s", line)
    else:
        with suppress(OSError, ValueError):  # a closed stderr must not end the download
            sys.stderr.write(f"rankload: {line}\n")
            sys.stderr.flush()
