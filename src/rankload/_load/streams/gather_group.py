"""The ranks that share the reading of a file and exchange what they read."""

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

#: While a collective runs: the first sleep, and the longest.
_SLEEP_SECONDS = (50e-6, 2e-3)

#: The most that one sleep may count towards the deadline: more means that this process was stopped.
_MAX_SECONDS = 1.0

#: Between two looks for why a collective broke.
_LOOK_SECONDS = 0.05

#: torch 2.13 gives it another name, and warns of the old one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class GatherGroup:
    """The ranks of a process group, or one that is alone.

    Attributes:
        group: None for a rank that is alone.
        number: this rank's, among them.
        count: how many they are.
        liveness_seconds: how long to wait for word of why a collective broke: by then a rank that was killed is missed.
        progress_seconds: how long one exchange may take.
        meet: waits until all of them have come.
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
        """Connect with the others, which may be the first collective of the process group. Collective.

        To be called when all memory has been allocated: who fails for want of it must do so before. Backends connect
        in C++, deaf to signals and deadlines, so that is left to a thread.

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
            own: this rank's part of it, ``uint8[n]``.
            check_cancelled: see `end`.
        """
        if self.count == 1:
            return None
        with self._broken_means_lost(check_cancelled):
            return self._exchange(whole, own)

    def end(self, work: dist.Work | None, check_cancelled: Callable[[], None]) -> None:
        """Wait until all shares are there.

        Args:
            work: what was begun.
            check_cancelled: called all the while; raises what another rank has failed with.

        Raises:
            RankLostError: the exchange broke, and nobody says why.
            ProgressTimeoutError: it takes too long.
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
        """Do what Work.wait() does, but heed signals, deadlines and what another rank has failed with."""
        sleep, longest = _SLEEP_SECONDS
        waited = SuspendAwareTimer(_MAX_SECONDS)
        while not is_over():
            check_cancelled()
            if waited.seconds >= self.progress_seconds:
                raise ProgressTimeoutError(
                    f"the ranks have not got on with exchanging what they read for {waited.seconds:.0f} s: a hung "
                    "filesystem or network; raise timeout= if this is normal here"
                )
            time.sleep(sleep)
            sleep = min(2 * sleep, longest)
            waited.count()

    @contextmanager
    def _broken_means_lost(self, check_cancelled: Callable[[], None]) -> Iterator[None]:
        """Translate a backend's error, unless another rank tells what it has failed with."""
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
