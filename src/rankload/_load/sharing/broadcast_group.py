"""The ranks of a process group to which one of them broadcasts what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from typing_extensions import override

from rankload._load.sharing.exchange_group import ExchangeGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rankload._settings import Settings


@dataclass(frozen=True)
class BroadcastGroup(ExchangeGroup):
    """The ranks of one process group. The source's share is the whole bucket.

    Attributes:
        source: rank in the group.
    """

    source: int = 0

    @classmethod
    def of(cls, group: ProcessGroup, source: int, settings: Settings) -> BroadcastGroup:
        """Return the ranks of a process group."""
        return cls((group,), settings.liveness_seconds, settings.progress_seconds, source)

    @override
    def share_of(self, bucket_bytes: int) -> tuple[int, int, int]:
        is_source = dist.get_rank(self.groups[0]) == self.source
        return bucket_bytes, 0, bucket_bytes if is_source else 0

    @override
    def _start(self, content: torch.Tensor, number: int) -> dist.Work | None:
        group = self.groups[number]
        return dist.broadcast(content, dist.get_global_rank(group, self.source), group=group, async_op=True)  # type: ignore[no-any-return]
