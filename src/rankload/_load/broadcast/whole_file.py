"""Broadcast a whole checkpoint file into the memory of every node; torch.load then reads the copy like a file.

So all formats, ties and nesting load exactly as at the source. On the CPU the ranks of a node share one copy, as they
would share the pages of a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rankload._cache.access import is_trusted
from rankload._cache.files import wrap_read_errors
from rankload._cache.layout import Entry
from rankload._cache.record import find_record
from rankload._coordination.call_context import CallContext
from rankload._coordination.channel import Channel
from rankload._load.broadcast.header import BadHeaderError, check_names
from rankload._load.node.held import hold
from rankload._load.node.memory_file import folder_of, writable
from rankload._load.node.node_memory import NodeMemory
from rankload._load.node.parts import parts_of
from rankload._platform.host import kernel_id
from rankload._relay.blocks import FileBlock
from rankload._relay.opening import open_relay
from rankload._relay.relay import Relay
from rankload._types import FetchedFile
from rankload.errors import CoordinationError, DigestMismatchError, RankloadError


def broadcast_files(path: Path | None, file: FetchedFile | None, source: int, call: CallContext) -> tuple[Path, str]:
    """Bring the source's checkpoint to every node. Collective.

    Ranks under the source's kernel that can open its files use those. On every other node one rank receives the bytes,
    and the other ranks open its memory.

    Args:
        path: the checkpoint, or the index of one in several files, at the source; None on other ranks.
        file: the file that the source fetched, of which ``path`` may be a copy; None on other ranks.
        source: rank of the source.
        call: context of the call. Its stack releases the memory: close it after torch.load.

    Returns:
        This rank's path of the checkpoint, on disk or in memory; and the path at the source, for messages.
    """
    announced = announce(path, file, source, call.channel)
    sizes: dict[str, int] = announced["sizes"]
    here = path if path is not None else find(announced, call.stack)
    memory = None if here is not None else NodeMemory.claim(sizes, call.channel, call.stack)
    relay = open_relay(call.channel, source, call.settings, takes_part=memory is not None and memory.is_received_here)
    if relay is not None:
        relay.bytes_total = sum(sizes.values())
        if path is not None:
            send_files(relay, path.parent, sizes)
        else:
            assert memory is not None
            receive_files(relay, memory.descriptors, sizes, announced["sha256"])
    if here is not None:
        return here, announced["shown"]
    assert memory is not None
    memory.tell_or_wait(call.channel)
    return folder_of(memory.descriptors, call.stack) / next(iter(sizes)), announced["shown"]


def announce(path: Path | None, file: FetchedFile | None, source: int, channel: Channel) -> dict[str, Any]:
    """Announce the source's files to all ranks; on other ranks, wait for the announcement.

    Returns:
        ``path``; its name in messages (``shown``); ``identity``; ``may_map``: whether the file may stay mapped; and by
        file name, with the checkpoint or its index first: ``sizes`` in bytes, and ``sha256`` from trusted records.

    Raises:
        CoordinationError: the source's file names are invalid.
    """
    if path is None or file is None:
        announced = channel.wait_for("broadcast/files", from_rank=source)
        try:
            check_names(announced["sizes"])
        except BadHeaderError as error:
            raise CoordinationError(f"rank {source} announces invalid file names: {error}") from error
        return announced
    files = {name: path.parent / name for name in (path.name, *parts_of(path))}
    digests = {name: _recorded_digest(file.path.parent / name, one.stat()) for name, one in files.items()}
    digests[path.name] = file.sha256 or digests[path.name]
    announced = {
        "path": str(file.path),
        "shown": str(file.path),
        "identity": _identity(path),
        "may_map": file.is_published or path != file.path,
        "sizes": {name: one.stat().st_size for name, one in files.items()},
        "sha256": {name: digest for name, digest in digests.items() if digest is not None},
    }
    channel.post("broadcast/files", announced)
    return announced


def find(announced: dict[str, Any], stack: ExitStack) -> Path | None:
    """Return a path by which this process reads the announced file from the same page cache; None if it cannot."""
    path = Path(announced["path"])
    with suppress(OSError, RankloadError):
        held = hold(path, announced["sha256"].get(path.name), stack)
        if not held.is_changeable and _identity(held.path) == announced["identity"]:
            return held.loaded_by_name(stack)
    return None


def send_files(relay: Relay, folder: Path, sizes: Mapping[str, int]) -> None:
    """Send whole files, one after the other."""
    for name, size_bytes in sizes.items():
        with wrap_read_errors(folder / name), (folder / name).open("rb", buffering=0) as file:
            relay.send(FileBlock(file.fileno(), 0, size_bytes))


def receive_files(
    relay: Relay, descriptors: Mapping[str, int], sizes: Mapping[str, int], digests: Mapping[str, str]
) -> None:
    """Receive the files that `send_files` sends.

    Args:
        relay: relay from the source.
        descriptors: descriptors of the files in memory, by name.
        sizes: sizes of the files in bytes, by name.
        digests: known SHA-256 digests, by name.

    Raises:
        CoordinationError: something between the nodes changed the bytes.
        DigestMismatchError: the source sent other bytes than were verified when the file was fetched.
    """
    for name, size_bytes in sizes.items():
        with writable(descriptors[name], 0, size_bytes) as whole:
            found = relay.receive(whole)
        if found != digests.get(name, found):
            raise DigestMismatchError(
                f"{name}: the source sent a file with SHA-256 {found}, but its record says {digests[name]}: the file "
                "was damaged or replaced after it was fetched; remove it on the source's node, and load again",
                expected=digests[name],
                got=found,
            )


def _recorded_digest(path: Path, status: os.stat_result) -> str | None:
    with wrap_read_errors(path):
        found = find_record(Entry(path).record_path)
    if found is None or found.record is None or found.owner_uid is None or not is_trusted(found.owner_uid):
        return None
    return found.record.sha256 if found.record.vouches_for(status) else None


def _identity(path: Path) -> str:
    status = path.stat()
    return "-".join(map(str, (kernel_id(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)))
