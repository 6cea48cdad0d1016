"""Which carrier a call gets."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rankload._coordination.rank_channel import RankChannel
from rankload._coordination.single_process import LoneChannel
from rankload._load.broadcast.whole_file import announce, find
from rankload._load.delivery.base import Carrier
from rankload._load.delivery.broadcast_receiver import Receiving
from rankload._load.delivery.broadcast_sender import Sending
from rankload._load.delivery.gather import Gathering
from rankload._load.delivery.read import Reading
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.node.unpacked_once import with_unpacked
from rankload._relay.opening import open_relay
from rankload._settings import Settings
from rankload._types import FetchedFile

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def open_carrier(
    delivery: str,
    path: Path | None,
    file: FetchedFile | None,
    source: int,
    channel: LoneChannel | RankChannel,
    group: ProcessGroup | None,
    settings: Settings,
    closing: ExitStack,
) -> Carrier:
    """Open what brings the bytes. Collective.

    Args:
        delivery: ``"read"``, ``"broadcast"`` from one rank's file to all, ``"gather"``, or ``"auto"``.
        path: the checkpoint; None for ranks that did not fetch one.
        file: what was fetched, of which ``path`` may be a copy.
        source: the rank that broadcasts.
        channel: of the call.
        group: over which the call is; None for the default one.
        settings: deadlines.
        closing: closes files.
    """
    if not isinstance(channel, RankChannel):
        assert path is not None
        return Reading(_files(path, channel, closing), channel, settings, "there is one rank")
    if delivery == "broadcast":
        return _open_broadcast(path, file, source, channel, settings, closing)
    assert path is not None
    files = _files(path, channel, closing)
    if delivery == "gather":
        return Gathering(files, channel, group, settings)
    return Reading(files, channel, settings, Carrier.reason if delivery == "read" else "each rank reads what it needs")


def _files(path: Path, channel: LoneChannel | RankChannel, closing: ExitStack) -> CheckpointFiles:
    return CheckpointFiles(path, closing, with_unpacked(path, channel, closing))


def _open_broadcast(
    path: Path | None,
    file: FetchedFile | None,
    source: int,
    channel: RankChannel,
    settings: Settings,
    closing: ExitStack,
) -> Carrier:
    announced = announce(path, file, source, channel)
    here = path if path is not None else find(announced, closing)
    relay = open_relay(channel, source, settings, takes_part=here is None)
    if here is None:
        assert relay is not None
        return Receiving(relay, source, announced, channel, settings, closing)
    files = _files(here, channel, closing)
    files.may_map = files.may_map and (announced["may_map"] or files.is_in_memory)
    if relay is None:
        return Reading(files, channel, settings, "the source's file is within reach")
    return Sending(files, relay, channel, settings)
