"""The ranks that share the reading of a file, and exchange their shares by all-gathers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from typing_extensions import override

from rankload._load.sharing.exchange_group import ExchangeGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rankload._settings import Settings

#: Shares begin at multiples of this: a multiple of every element size.
ALIGNMENT_BYTES = 64

#: torch 2.13 renamed this function, and warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class GatherGroup(ExchangeGroup):
    """The ranks of a process group, or of several that form a grid, or a single rank.

    In a grid, the ranks all-gather over the first process group, then over the next, with larger blocks. So the first
    one moves the fewest bytes: let it be the one whose ranks are farthest apart.
    """

    @classmethod
    def of(cls, groups: tuple[ProcessGroup, ...], settings: Settings) -> GatherGroup:
        """Return the ranks of process groups: one for each dimension of the grid."""
        return cls(groups, settings.liveness_seconds, settings.progress_seconds)

    @cached_property
    def number(self) -> int:
        """Number of this rank, and of its share. In a grid, the first process group's ranks have consecutive ones."""
        number = 0
        for group in reversed(self.groups):
            number = number * dist.get_world_size(group) + dist.get_rank(group)
        return number

    @override
    def share_of(self, bucket_bytes: int) -> tuple[int, int, int]:
        """Cut a bucket into shares of one size. Its end may leave the last ones unfilled."""
        size = -(-bucket_bytes // (self.count * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
        begin = min(self.number * size, bucket_bytes)
        return size * self.count, begin, min(begin + size, bucket_bytes)

    @override
    def _start(self, content: torch.Tensor, number: int) -> dist.Work | None:
        """Exchange blocks over a process group, after those before it: a block holds the shares of their ranks."""
        group, count_before = self.groups[number], math.prod(map(dist.get_world_size, self.groups[:number]))
        block_bytes = content.numel() // self.count * count_before
        count = dist.get_world_size(group)
        begin = self.number // (count_before * count) * count * block_bytes
        whole = content.narrow(0, begin, count * block_bytes)
        own = whole.narrow(0, dist.get_rank(group) * block_bytes, block_bytes)
        return _all_gather(whole, own, group=group, async_op=True)  # type: ignore[no-any-return]
