"""One copy of a checkpoint's files in the memory of a node, shared by its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from rankload._coordination.channel import Channel
from rankload._load.node.memory_file import make_memory_file, path_for_others
from rankload._platform.host import process_space_id


@dataclass(frozen=True)
class NodeMemory:
    """A node's memory for a checkpoint's files.

    Attributes:
        descriptors: descriptors of the files in memory, by name.
        receiver: rank that fills the files.
        is_received_here: whether this rank fills the files.
        purpose: what the memory is for.
    """

    descriptors: dict[str, int]
    receiver: int
    is_received_here: bool
    purpose: str = "broadcast"

    @classmethod
    def claim(
        cls,
        sizes: Mapping[str, int],
        channel: Channel,
        stack: ExitStack,
        *,
        purpose: str = "broadcast",
        fits: Callable[[], bool] | None = None,
    ) -> NodeMemory | None:
        """Open the memory of the first rank of this node. Make this rank's own memory if that is impossible.

        Args:
            sizes: sizes of the files in bytes, by name.
            channel: channel of the call.
            stack: releases the memory. Memory that others may still have to open is released at the end of the call.
            purpose: what the memory is for; one call may use memory for several purposes.
            fits: called before memory is allocated. If it returns False, the result is None, on all ranks that would
                have shared the memory.
        """
        rank, space = channel.identity.rank, process_space_id()
        first = rank if space is None else channel.claim(f"{purpose}/memory/{space}")
        if first != rank:
            paths = channel.wait_for(f"{purpose}/memory of {first}", from_rank=first)["paths"]
            if paths is None:
                return None
            with suppress(OSError):
                return cls(_opened(paths, stack), first, is_received_here=False, purpose=purpose)
        if fits is not None and not fits():
            if first == rank:
                channel.post(f"{purpose}/memory of {rank}", {"paths": None})
            return None
        kept = stack
        if first == rank:
            kept = ExitStack()
            channel.on_exit(kept.close)  # after the verdict, so that a late rank can still open the memory
        descriptors = {name: make_memory_file(size_bytes, kept) for name, size_bytes in sizes.items()}
        if first == rank:
            paths = {name: path_for_others(descriptor) for name, descriptor in descriptors.items()}
            channel.post(f"{purpose}/memory of {rank}", {"paths": paths})
        return cls(descriptors, rank, is_received_here=True, purpose=purpose)

    def tell_or_wait(self, channel: Channel) -> None:
        """Tell the node's other ranks that the files are complete; on those ranks, wait for that."""
        if self.is_received_here:
            channel.post(f"{self.purpose}/received by {self.receiver}", {})
        else:
            channel.wait_for(f"{self.purpose}/received by {self.receiver}", from_rank=self.receiver)


def _opened(paths: Mapping[str, str], stack: ExitStack) -> dict[str, int]:
    descriptors = {}
    for name, path in paths.items():
        descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptors[name])
    return descriptors
