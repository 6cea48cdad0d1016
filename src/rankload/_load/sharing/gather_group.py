"""The ranks that share the reading of a file, and exchange their shares by all-gathers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rankload._load.device.pinned import use_in_thread
from rankload._load.device.readers import Readers
from rankload._platform.clock import SuspendAwareTimer
from rankload.errors import ProgressTimeoutError, RankloadError, RankLostError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rankload._settings import Settings

#: First and longest sleep between two checks of a running collective.
_SLEEP_SECONDS = (50e-6, 2e-3)

#: The most that one sleep may count towards the deadline: a longer one means that this process was stopped.
_MAX_SECONDS = 1.0

#: Interval between two checks for another rank's error after a collective broke.
_LOOK_SECONDS = 0.05

#: torch 2.13 renamed this function, and warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class GatherGroup:
    """The ranks of a process group, or of several that form a grid, or a single rank.

    In a grid, the ranks all-gather over the first process group, then over the next, with larger blocks. So the first
    one moves the fewest bytes: let it be the one whose ranks are farthest apart.

    Attributes:
        groups: process groups of this rank, one for each dimension of the grid; empty for a single rank.
        liveness_seconds: how long to wait for another rank's error after a collective broke. A killed rank is noticed
            within that time.
        progress_seconds: time limit of one exchange.
    """

    groups: tuple[ProcessGroup, ...] = ()
    liveness_seconds: float = 0.0
    progress_seconds: float = 0.0

    @classmethod
    def of(cls, groups: tuple[ProcessGroup, ...], settings: Settings) -> GatherGroup:
        """Return the ranks of process groups."""
        return cls(groups, settings.liveness_seconds, settings.progress_seconds)

    @cached_property
    def count(self) -> int:
        """Number of ranks."""
        return math.prod(map(dist.get_world_size, self.groups))

    @cached_property
    def number(self) -> int:
        """Number of this rank, and of its share. In a grid, the first process group's ranks have consecutive ones."""
        number = 0
        for group in reversed(self.groups):
            number = number * dist.get_world_size(group) + dist.get_rank(group)
        return number

    def warm_up(self, device: torch.device, check_cancelled: Callable[[], None]) -> None:
        """Connect to the other ranks: this may be the first collective of the process group. Collective.

        Call this after all ranks have allocated their memory: one that runs out of it must fail before. Backends
        connect in C++, without regard to signals and deadlines, so a thread does it.

        Raises:
            RankLostError, ProgressTimeoutError: see `end`.
        """
        if not self.groups:
            return
        with Readers(1) as thread, self._broken_means_lost(check_cancelled):
            connected = thread.submit(partial(self._exchange_nothing, device))
            self._await(connected.done, check_cancelled)
            connected.result()

    def begin(self, content: torch.Tensor, check_cancelled: Callable[[], None]) -> dist.Work | None:
        """Begin to exchange shares, in place. Collective.

        Args:
            content: ``uint8[count * n]``, of which this rank has filled its own share.
            check_cancelled: see `end`.
        """
        if not self.groups:
            return None
        with self._broken_means_lost(check_cancelled):
            return self._gather(content, 0)

    def end(self, work: dist.Work | None, content: torch.Tensor, check_cancelled: Callable[[], None]) -> None:
        """Wait until all shares have arrived. Collective if there are several process groups.

        Args:
            work: result of `begin`.
            content: see `begin`.
            check_cancelled: called repeatedly during the wait; raises another rank's error.

        Raises:
            RankLostError: the exchange broke, and no rank reported an error.
            ProgressTimeoutError: the exchange exceeded its time limit.
        """
        with self._broken_means_lost(check_cancelled):
            for dimension in range(len(self.groups)):
                if dimension:
                    work = self._gather(content, dimension)
                if work is not None:
                    self._await(work.is_completed, check_cancelled)
                    work.wait()

    def _gather(self, content: torch.Tensor, dimension: int) -> dist.Work | None:
        """Exchange blocks over one process group, after those before it: a block holds the shares of their ranks."""
        group, count_before = self.groups[dimension], math.prod(map(dist.get_world_size, self.groups[:dimension]))
        block_bytes = content.numel() // self.count * count_before
        count = dist.get_world_size(group)
        begin = self.number // (count_before * count) * count * block_bytes
        whole = content.narrow(0, begin, count * block_bytes)
        own = whole.narrow(0, dist.get_rank(group) * block_bytes, block_bytes)
        return _all_gather(whole, own, group=group, async_op=True)  # type: ignore[no-any-return]

    def _exchange_nothing(self, device: torch.device) -> None:
        use_in_thread(device)
        content = torch.zeros(self.count, dtype=torch.uint8, device=device)
        for dimension in range(len(self.groups)):
            work = self._gather(content, dimension)
            if work is not None:
                work.wait()

    def _await(self, is_over: Callable[[], bool], check_cancelled: Callable[[], None]) -> None:
        """Wait like Work.wait(), but react to signals, deadlines and errors of other ranks."""
        sleep, longest = _SLEEP_SECONDS
        waited = SuspendAwareTimer(_MAX_SECONDS)
        while not is_over():
            check_cancelled()
            if waited.seconds >= self.progress_seconds:
                raise ProgressTimeoutError(
                    f"the ranks made no progress in exchanging what they read for {waited.seconds:.0f} s: a hung "
                    "filesystem or network; raise timeout= if this is normal here"
                )
            time.sleep(sleep)
            sleep = min(2 * sleep, longest)
            waited.count()

    @contextmanager
    def _broken_means_lost(self, check_cancelled: Callable[[], None]) -> Iterator[None]:
        """Translate a backend's error into RankLostError, unless another rank reports its own error."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, (RankloadError, torch.OutOfMemoryError)):
                raise
            deadline = time.monotonic() + self.liveness_seconds
            while time.monotonic() < deadline:
                check_cancelled()
                time.sleep(_LOOK_SECONDS)
            raise RankLostError(f"the ranks could not exchange what they had read: {error}") from error
