"""The progress bar of the downloading rank, if its stderr is a terminal."""

from __future__ import annotations

import logging

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """tqdm's bar without tqdm's monitor thread, which would outlive the download, and make every later fork warn.

    Args:
        file_name: text before the bar.
        initial_bytes: number of bytes that an earlier download left; they do not count for the rate.
    """

    monitor_interval = 0

    def __init__(self, file_name: str, initial_bytes: int) -> None:
        super().__init__(unit="B", unit_scale=True, unit_divisor=1024, desc=file_name, initial=initial_bytes)
        _clearing.bars.append(self)

    def show(self, done_bytes: int, total_bytes: int | None) -> None:
        """Move the bar to a number of bytes, which is smaller than before if the download starts over."""
        self.total = total_bytes
        if done_bytes < self.n:
            self.initial = 0
            self.reset()
        self.update(done_bytes - self.n)

    def close(self) -> None:
        """Finish the bar. It stays visible, and later log lines come after it."""
        if self in _clearing.bars:
            _clearing.bars.remove(self)
        super().close()


class _ClearingFilter(logging.Filter):
    """Clears the bar before a log line is written in its place. The bar's next update draws it again."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[ProgressBar] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Clear all bars; let every record through."""
        for bar in tuple(self.bars):
            bar.clear()
        return True


_clearing = _ClearingFilter()
logging.getLogger("rankload").addFilter(_clearing)
