"""`CallContext`: the objects that all steps of one call share."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankload._coordination.channel import Channel
from rankload._settings import Settings
from rankload._types import Identity, Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class CallContext:
    """One call, collective or not, on this rank.

    Attributes:
        channel: channel to the other ranks of the call.
        settings: deadlines and limits, with the call's own ``timeout=``.
        stack: releases files and memory at the end of the call, before its verdict.
        group: process group that the caller passed; None if the caller passed none.
    """

    channel: Channel
    settings: Settings
    stack: ExitStack
    group: ProcessGroup | None = None

    @property
    def identity(self) -> Identity:
        """Identity of this process among the ranks of the call."""
        return self.channel.identity

    def report(self, progress: Progress) -> None:
        """Publish this rank's progress (see `Channel.report`)."""
        self.channel.report(progress)

    def report_loading(self, bytes_done: int = 0) -> None:
        """Publish that this rank is loading, with the number of bytes read so far."""
        self.channel.report(Progress("loading", bytes_done))
