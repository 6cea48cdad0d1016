"""A whole checkpoint from one rank's file into the memory of every node: torch.load then reads it as a file.

So every format, ties, nesting and whatever else torch.load knows come out as they do at the source; and on the CPU the
ranks of a node share one copy, as they would share the pages of a file.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankload._cache.failures import reading
from rankload._deliver.broadcast.memory_file import make_memory_file, path_for_others, path_of, writable
from rankload._job.channel import RankChannel
from rankload._job.machine import kernel_id, process_space_id
from rankload._job.relay.opening import open_relay
from rankload._job.relay.relay import FileBlock, Relay
from rankload._settings import Settings


def broadcast_file(
    path: Path | None, source: int, channel: RankChannel, settings: Settings, closing: ExitStack
) -> Path:
    """Return where this rank finds the source's file: on disk, or what has come of it in memory. Collective.

    Ranks under the source's kernel that can open its file use that; of the others one for each node receives the
    bytes, and the rest of the node opens its memory.

    Args:
        path: the file, at the source; None elsewhere.
        source: its rank.
        channel: of the call.
        settings: deadlines.
        closing: lets go of the memory: to be closed when torch.load is through.
    """
    announced = announce(path, source, channel)
    here = path if path is not None else find(announced)
    memory = None if here is not None else _Memory.claim(announced["size_bytes"], channel, closing)
    relay = open_relay(channel, source, settings, takes_part=memory is not None and memory.is_received_here)
    if relay is not None:
        relay.bytes_total = announced["size_bytes"]
        if path is not None:
            send_file(relay, path)
        else:
            assert memory is not None
            with writable(memory.descriptor, 0, announced["size_bytes"]) as whole:
                relay.receive(whole)
    if here is not None:
        return here
    assert memory is not None
    memory.tell_or_wait(channel)
    return path_of(memory.descriptor)


def announce(path: Path | None, source: int, channel: RankChannel) -> dict[str, Any]:
    """Tell where the source's file is, or hear it."""
    if path is None:
        return channel.wait_for("broadcast/file", from_rank=source)
    announced = {"path": str(path), "identity": _identity(path), "size_bytes": path.stat().st_size}
    channel.post("broadcast/file", announced)
    return announced


def find(announced: dict[str, Any]) -> Path | None:
    """Return the announced file if this process can read it from the same page cache."""
    path = Path(announced["path"])
    with suppress(OSError):
        path.open("rb").close()
        if _identity(path) == announced["identity"]:
            return path
    return None


def send_file(relay: Relay, path: Path) -> None:
    """Send a whole file."""
    with reading(path), path.open("rb", buffering=0) as file:
        relay.send(FileBlock(file.fileno(), 0, os.fstat(file.fileno()).st_size))


def _identity(path: Path) -> str:
    status = path.stat()
    return "-".join(map(str, (kernel_id(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)))


@dataclass(frozen=True)
class _Memory:
    """A node's memory for the file.

    Attributes:
        descriptor: of the file in memory.
        receiver: the rank that receives into it.
        is_received_here: whether that is this rank.
    """

    descriptor: int
    receiver: int
    is_received_here: bool

    @classmethod
    def claim(cls, size_bytes: int, channel: RankChannel, closing: ExitStack) -> _Memory:
        """Open the memory of the rank of this node that came first; make our own where there is none to be opened."""
        rank, space = channel.identity.rank, process_space_id()
        first = rank if space is None else channel.claim(f"broadcast/memory/{space}")
        if first != rank:
            path = channel.wait_for(f"broadcast/memory of {first}", from_rank=first)["path"]
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                closing.callback(os.close, descriptor)
                return cls(descriptor, first, is_received_here=False)
        descriptor = make_memory_file(size_bytes, closing)
        if first == rank:
            channel.post(f"broadcast/memory of {rank}", {"path": path_for_others(descriptor)})
        return cls(descriptor, rank, is_received_here=True)

    def tell_or_wait(self, channel: RankChannel) -> None:
        """Tell the others of the node that all has come, or wait for that."""
        if self.is_received_here:
            channel.post(f"broadcast/received by {self.receiver}", {})
        else:
            channel.wait_for(f"broadcast/received by {self.receiver}", from_rank=self.receiver)
