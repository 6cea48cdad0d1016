"""The ranks that share out the reading of a file, and get one another's shares."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rankload._errors import RankloadError, RankLostError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: While a collective runs: the first sleep, and the longest.
_SLEEP_SECONDS = (50e-6, 2e-3)

#: Between two looks for why a collective broke.
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Sharers:
    """The ranks of a process group, or one that is alone.

    Attributes:
        group: None for a rank that is alone.
        number: this rank's, among them.
        count: how many they are.
        patience_seconds: how long to wait for word of why a collective broke: by then a rank that was killed is missed.
    """

    group: ProcessGroup | None = None
    number: int = 0
    count: int = 1
    patience_seconds: float = 0.0

    @classmethod
    def of(cls, group: ProcessGroup, patience_seconds: float) -> Sharers:
        """Return the ranks of a process group."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group), patience_seconds)

    def begin(self, whole: torch.Tensor, own: torch.Tensor) -> dist.Work | None:
        """Begin to exchange shares, in place. Collective.

        Args:
            whole: ``uint8[count * n]``.
            own: this rank's part of it, ``uint8[n]``.
        """
        if self.count == 1:
            return None
        work: dist.Work | None = dist.all_gather_into_tensor(whole, own, group=self.group, async_op=True)
        return work

    def end(self, work: dist.Work | None, look: Callable[[], None]) -> None:
        """Wait until all shares are there.

        Args:
            work: what was begun.
            look: called all the while; raises what another rank has failed with.

        Raises:
            RankLostError: the exchange broke, and nobody says why.
        """
        if work is None:
            return
        sleep, longest = _SLEEP_SECONDS
        try:
            while not work.is_completed():  # Work.wait() heeds neither signals nor what another rank has failed with
                look()
                time.sleep(sleep)
                sleep = min(2 * sleep, longest)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, RankloadError):
                raise
            raise self._broken(error, look) from error

    def _broken(self, error: RuntimeError, look: Callable[[], None]) -> RankLostError:
        deadline = time.monotonic() + self.patience_seconds
        while time.monotonic() < deadline:
            look()
            time.sleep(_LOOK_SECONDS)
        return RankLostError(f"the ranks could not exchange what they had read: {error}")
