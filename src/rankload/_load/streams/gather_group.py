"""The ranks that share the reading of a file, and exchange their shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    """The ranks of a process group, or a single rank.

    Attributes:
        group: the process group; None for a single rank.
        number: this rank's number in the group.
        count: number of ranks in the group.
        liveness_seconds: how long to wait for another rank's error after a collective broke. A killed rank is noticed
            within that time.
        progress_seconds: time limit of one exchange.
        meet: waits until all ranks have arrived.
    """

    group: ProcessGroup | None = None
    number: int = 0
    count: int = 1
    liveness_seconds: float = 0.0
    progress_seconds: float = 0.0
    meet: Callable[[], object] = lambda: None

    @classmethod
    def of(cls, group: ProcessGroup, settings: Settings, meet: Callable[[], object]) -> GatherGroup:
        """Return the ranks of a process group."""
        rank, count = dist.get_rank(group), dist.get_world_size(group)
        return cls(group, rank, count, settings.liveness_seconds, settings.progress_seconds, meet)

    def warm_up(self, device: torch.device, check_cancelled: Callable[[], None]) -> None:
        """Connect to the other ranks: this may be the first collective of the process group. Collective.

        Call this after all memory has been allocated: a rank that runs out of memory must fail before. Backends connect
        in C++, without regard to signals and deadlines, so a thread does it.

        Raises:
            RankLostError, ProgressTimeoutError: see `end`.
        """
        if self.count == 1:
            return
        self.meet()
        with Readers(1) as thread, self._broken_means_lost(check_cancelled):
            connected = thread.submit(partial(self._exchange_nothing, device))
            self._await(connected.done, check_cancelled)
            connected.result()

    def begin(self, whole: torch.Tensor, own: torch.Tensor, check_cancelled: Callable[[], None]) -> dist.Work | None:
        """Begin to exchange shares, in place. Collective.

        Args:
            whole: ``uint8[count * n]``.
            own: this rank's part of ``whole``, ``uint8[n]``.
            check_cancelled: see `end`.
        """
        if self.count == 1:
            return None
        with self._broken_means_lost(check_cancelled):
            return self._exchange(whole, own)

    def end(self, work: dist.Work | None, check_cancelled: Callable[[], None]) -> None:
        """Wait until all shares have arrived.

        Args:
            work: result of `begin`.
            check_cancelled: called repeatedly during the wait; raises another rank's error.

        Raises:
            RankLostError: the exchange broke, and no rank reported an error.
            ProgressTimeoutError: the exchange exceeded its time limit.
        """
        if work is None:
            return
        with self._broken_means_lost(check_cancelled):
            self._await(work.is_completed, check_cancelled)
            work.wait()

    def _exchange(self, whole: torch.Tensor, own: torch.Tensor) -> dist.Work | None:
        return _all_gather(whole, own, group=self.group, async_op=True)  # type: ignore[no-any-return]

    def _exchange_nothing(self, device: torch.device) -> None:
        use_in_thread(device)
        whole = torch.zeros(self.count, dtype=torch.uint8, device=device)
        work = self._exchange(whole, whole.narrow(0, self.number, 1))
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
