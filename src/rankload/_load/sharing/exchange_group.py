"""Ranks that exchange the buckets of a load by collectives of their process groups."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rankload._load.device.pinned import use_in_thread
from rankload._load.device.readers import Readers
from rankload._platform.clock import SuspendAwareTimer
from rankload.errors import ProgressTimeoutError, RankloadError, RankLostError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: First and longest sleep between two checks of a running collective.
_SLEEP_SECONDS = (50e-6, 2e-3)

#: The most that one sleep may count towards the deadline: a longer one means that this process was stopped.
_MAX_SECONDS = 1.0

#: Interval between two checks for another rank's error after a collective broke.
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class ExchangeGroup(ABC):
    """Ranks that each read a share of every bucket, and exchange the shares.

    Attributes:
        groups: process groups of this rank, whose collectives follow one another; empty for a single rank.
        liveness_seconds: how long to wait for another rank's error after a collective broke. A killed rank is noticed
            within that time.
        progress_seconds: time limit of one exchange.
    """

    groups: tuple[ProcessGroup, ...] = ()
    liveness_seconds: float = 0.0
    progress_seconds: float = 0.0

    @cached_property
    def count(self) -> int:
        """Number of ranks."""
        return math.prod(map(dist.get_world_size, self.groups))

    @abstractmethod
    def share_of(self, bucket_bytes: int) -> tuple[int, int, int]:
        """Return the bytes of a bucket with all shares, and where this rank's share begins and ends in it."""

    @abstractmethod
    def _start(self, content: torch.Tensor, number: int) -> dist.Work | None:
        """Start the collective of one process group, by its number in ``groups``."""

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
            content: ``uint8[n]``: a bucket with all shares, of which this rank has filled its own.
            check_cancelled: see `end`.
        """
        if not self.groups:
            return None
        with self._broken_means_lost(check_cancelled):
            return self._start(content, 0)

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
            for number in range(len(self.groups)):
                if number:
                    work = self._start(content, number)
                if work is not None:
                    self._await(work.is_completed, check_cancelled)
                    work.wait()

    def _exchange_nothing(self, device: torch.device) -> None:
        use_in_thread(device)
        content = torch.zeros(self.count, dtype=torch.uint8, device=device)
        for number in range(len(self.groups)):
            work = self._start(content, number)
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
