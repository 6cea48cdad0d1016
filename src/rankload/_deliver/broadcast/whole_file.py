"""A whole checkpoint from one rank's disk into the memory of every node: torch.load then reads it as a file.

So every format, ties, nesting and whatever else torch.load knows come out as they do at the source; and on the CPU the
ranks of a node share one copy, as they would share the pages of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rankload._cache.failures import reading
from rankload._deliver.memory_file import folder_of, writable
from rankload._deliver.node_memory import NodeMemory
from rankload._deliver.parts import parts_of
from rankload._job.channel import RankChannel
from rankload._job.machine import kernel_id
from rankload._job.relay.opening import open_relay
from rankload._job.relay.relay import FileBlock, Relay
from rankload._settings import Settings


def broadcast_files(
    path: Path | None, source: int, channel: RankChannel, settings: Settings, closing: ExitStack
) -> tuple[Path, str]:
    """Return where this rank finds the source's checkpoint: on disk, or what has come of it in memory. Collective.

    And where it is at the source, for messages.

    Ranks under the source's kernel that can open its files use these; of the others one for each node receives the
    bytes, and the rest of the node opens its memory.

    Args:
        path: the checkpoint, or the index of one in several files, at the source; None elsewhere.
        source: its rank.
        channel: of the call.
        settings: deadlines.
        closing: lets go of the memory: to be closed when torch.load is through.
    """
    announced = announce(path, source, channel)
    sizes: dict[str, int] = announced["sizes"]
    here = path if path is not None else find(announced)
    memory = None if here is not None else NodeMemory.claim(sizes, channel, closing)
    relay = open_relay(channel, source, settings, takes_part=memory is not None and memory.is_received_here)
    if relay is not None:
        relay.bytes_total = sum(sizes.values())
        if path is not None:
            send_files(relay, path.parent, sizes)
        else:
            assert memory is not None
            receive_files(relay, memory.descriptors, sizes)
    if here is not None:
        return here, str(here)
    assert memory is not None
    memory.tell_or_wait(channel)
    return folder_of(memory.descriptors, closing) / next(iter(sizes)), announced["path"]


def announce(path: Path | None, source: int, channel: RankChannel) -> dict[str, Any]:
    """Tell where the source's files are and how large, the checkpoint or its index first; or hear it."""
    if path is None:
        return channel.wait_for("broadcast/files", from_rank=source)
    sizes = {name: (path.parent / name).stat().st_size for name in (path.name, *parts_of(path))}
    announced = {"path": str(path), "identity": _identity(path), "sizes": sizes}
    channel.post("broadcast/files", announced)
    return announced


def find(announced: dict[str, Any]) -> Path | None:
    """Return the announced file if this process can read it from the same page cache."""
    path = Path(announced["path"])
    with suppress(OSError):
        for name in announced["sizes"]:
            (path.parent / name).open("rb").close()
        if _identity(path) == announced["identity"]:
            return path
    return None


def send_files(relay: Relay, folder: Path, sizes: Mapping[str, int]) -> None:
    """Send whole files, one after the other."""
    for name, size_bytes in sizes.items():
        with reading(folder / name), (folder / name).open("rb", buffering=0) as file:
            relay.send(FileBlock(file.fileno(), 0, size_bytes))


def receive_files(relay: Relay, descriptors: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Receive what `send_files` sends."""
    for name, size_bytes in sizes.items():
        with writable(descriptors[name], 0, size_bytes) as whole:
            relay.receive(whole)


def _identity(path: Path) -> str:
    status = path.stat()
    return "-".join(map(str, (kernel_id(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)))
