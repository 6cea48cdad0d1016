"""The bar on the downloading rank's stderr."""

from __future__ import annotations

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """tqdm's bar, without its monitor thread: that would outlive the download, and make every later fork warn.

    Args:
        file_name: what it says in front.
        is_wanted: False shows nothing; True shows it where stderr is a terminal.
    """

    monitor_interval = 0

    def __init__(self, file_name: str, *, is_wanted: bool) -> None:
        super().__init__(
            disable=None if is_wanted else True,  # None: quiet when stderr is no terminal
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=file_name,
        )

    def show(self, done_bytes: int, total_bytes: int | None) -> None:
        """Move to a number of bytes; fewer than before when a download starts over."""
        if not self.disable:
            self.total = total_bytes
            self.update(done_bytes - self.n)
