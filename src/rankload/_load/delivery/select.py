"""Choose the delivery strategy of a call.

What only a broadcast or a gather needs is imported for one: most calls read.
"""

from __future__ import annotations

from pathlib import Path

from rankload._coordination.call_context import CallContext
from rankload._load.delivery.read import ReadDelivery
from rankload._load.delivery.strategy import DeliveryStrategy
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.node.unpacked_once import with_unpacked
from rankload._types import FetchedFile


def open_strategy(
    delivery: str, path: Path | None, file: FetchedFile | None, source: int, call: CallContext
) -> DeliveryStrategy:
    """Choose and open the delivery strategy. Collective.

    Args:
        delivery: ``"read"``, ``"broadcast"`` from one rank's file to all, ``"gather"``, or ``"auto"``.
        path: path of the checkpoint; None on ranks that did not fetch it.
        file: the fetched file, of which ``path`` may be a copy.
        source: rank that broadcasts.
        call: context of the call.
    """
    if call.identity.world_size == 1:
        assert path is not None
        return ReadDelivery(_files(path, call), call, "there is one rank")
    if delivery == "broadcast":
        return _open_broadcast(path, file, source, call)
    assert path is not None
    files = _files(path, call)
    if delivery == "gather":
        from rankload._load.delivery.gather import GatherDelivery

        return GatherDelivery(files, call)
    reason = DeliveryStrategy.reason if delivery == "read" else "each rank reads what it needs"
    return ReadDelivery(files, call, reason)


def _files(path: Path, call: CallContext) -> CheckpointFiles:
    return CheckpointFiles(path, call.stack, with_unpacked(path, call))


def _open_broadcast(path: Path | None, file: FetchedFile | None, source: int, call: CallContext) -> DeliveryStrategy:
    from rankload._load.broadcast.whole_file import announce, find
    from rankload._load.delivery.broadcast_receiver import BroadcastReceiver
    from rankload._load.delivery.broadcast_sender import BroadcastSender
    from rankload._load.delivery.group_stream import GroupStream
    from rankload._relay.opening import open_relay

    announced = announce(path, file, source, call.channel)
    group = GroupStream(source, call) if call.settings.broadcast_over_group else None
    here = path
    if here is None and group is None:
        here = find(announced, call.stack)
    relay = open_relay(call.channel, source, call.settings, takes_part=here is None)
    if here is None:
        assert relay is not None
        return BroadcastReceiver(relay, source, announced, call, group)
    files = _files(here, call)
    files.may_map = files.may_map and (announced["may_map"] or files.is_in_memory)
    if relay is None:
        return ReadDelivery(files, call, "the source's file is within reach")
    return BroadcastSender(files, relay, call, group)
