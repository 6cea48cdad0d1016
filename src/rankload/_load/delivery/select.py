"""Choose the delivery strategy of a call."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rankload._coordination.channel import Channel
from rankload._load.broadcast.whole_file import announce, find
from rankload._load.delivery.broadcast_receiver import BroadcastReceiver
from rankload._load.delivery.broadcast_sender import BroadcastSender
from rankload._load.delivery.gather import GatherDelivery
from rankload._load.delivery.read import ReadDelivery
from rankload._load.delivery.strategy import DeliveryStrategy
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.node.unpacked_once import with_unpacked
from rankload._relay.opening import open_relay
from rankload._settings import Settings
from rankload._types import FetchedFile

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def open_strategy(
    delivery: str,
    path: Path | None,
    file: FetchedFile | None,
    source: int,
    channel: Channel,
    group: ProcessGroup | None,
    settings: Settings,
    stack: ExitStack,
) -> DeliveryStrategy:
    """Choose and open the delivery strategy. Collective.

    Args:
        delivery: ``"read"``, ``"broadcast"`` from one rank's file to all, ``"gather"``, or ``"auto"``.
        path: path of the checkpoint; None on ranks that did not fetch it.
        file: the fetched file, of which ``path`` may be a copy.
        source: rank that broadcasts.
        channel: channel of the call.
        group: process group of the call; None for the default group.
        settings: deadlines.
        stack: closes the files.
    """
    if channel.identity.world_size == 1:
        assert path is not None
        return ReadDelivery(_files(path, channel, stack), channel, settings, "there is one rank")
    if delivery == "broadcast":
        return _open_broadcast(path, file, source, channel, settings, stack)
    assert path is not None
    files = _files(path, channel, stack)
    if delivery == "gather":
        return GatherDelivery(files, channel, group, settings)
    return ReadDelivery(
        files, channel, settings, DeliveryStrategy.reason if delivery == "read" else "each rank reads what it needs"
    )


def _files(path: Path, channel: Channel, stack: ExitStack) -> CheckpointFiles:
    return CheckpointFiles(path, stack, with_unpacked(path, channel, stack))


def _open_broadcast(
    path: Path | None,
    file: FetchedFile | None,
    source: int,
    channel: Channel,
    settings: Settings,
    stack: ExitStack,
) -> DeliveryStrategy:
    announced = announce(path, file, source, channel)
    here = path if path is not None else find(announced, stack)
    relay = open_relay(channel, source, settings, takes_part=here is None)
    if here is None:
        assert relay is not None
        return BroadcastReceiver(relay, source, announced, channel, settings, stack)
    files = _files(here, channel, stack)
    files.may_map = files.may_map and (announced["may_map"] or files.is_in_memory)
    if relay is None:
        return ReadDelivery(files, channel, settings, "the source's file is within reach")
    return BroadcastSender(files, relay, channel, settings)
