"""Connect each node of the ring to the node before and to the next."""

from __future__ import annotations

import logging
from contextlib import closing

from rankload._coordination.channel import Channel
from rankload._relay.addresses import own_addresses
from rankload._relay.links import Link, LookAround, connect
from rankload._relay.listener import Listener
from rankload._types import Progress
from rankload.errors import CoordinationError

_logger = logging.getLogger("rankload")


class UnconnectedError(Exception):
    """Another node cannot reach its neighbour."""


def connect_ring(key: str, ranks: tuple[int, ...], channel: Channel, seconds: float) -> tuple[Link, Link]:
    """Return the connections from the node before, and to the next. Collective over ``ranks``.

    Args:
        key: key of the ring in the call.
        ranks: the ranks that act for the nodes, in the order of the ring.
        channel: channel of the call. The connections are closed when it ends.
        seconds: time after which a node counts as unreachable.

    Raises:
        CoordinationError: the next node cannot be reached, or no address of this one can be used.
    """
    with closing(Listener(own_addresses(channel.store_host))) as listener:
        return _connect(key, ranks, channel, seconds, listener, lambda: None)


def try_to_connect_ring(key: str, ranks: tuple[int, ...], channel: Channel, seconds: float) -> tuple[Link, Link] | None:
    """Return the connections as `connect_ring` does; None on all nodes if a node cannot be connected."""
    alarm, links = f"{key}/unconnected", None

    def look_for_alarm() -> None:
        if channel.has(alarm):
            raise UnconnectedError

    try:
        with closing(Listener(own_addresses(channel.store_host))) as listener:
            links = _connect(key, ranks, channel, seconds, listener, look_for_alarm)
    except UnconnectedError:
        pass
    except CoordinationError as error:
        if error.rank is not None or type(error) is not CoordinationError:  # another rank's error, or a lost rank
            raise
        _logger.warning("%s; each node fetches the file for itself", error)
        channel.post(alarm, {})
        channel.post(_way_key(key, channel.identity.rank), {})  # for neighbours that still wait for it
    rank, first = channel.identity.rank, ranks[0]
    channel.post(f"{key}/connected/{rank}", {"is_connected": links is not None})
    if rank == first:
        told = [channel.wait_for(f"{key}/connected/{other}", from_rank=other)["is_connected"] for other in ranks]
        channel.post(f"{key}/connected", {"are_all": all(told)})
    return links if channel.wait_for(f"{key}/connected", from_rank=first)["are_all"] else None


def _connect(
    key: str, ranks: tuple[int, ...], channel: Channel, seconds: float, listener: Listener, look: LookAround
) -> tuple[Link, Link]:
    member = ranks.index(channel.identity.rank)
    before, after = ranks[member - 1], ranks[(member + 1) % len(ranks)]
    watch = channel.watch_over({before, after})

    def look_around() -> None:
        watch(Progress("connecting"))
        look()

    def reach() -> Link:
        link = connect(after, ways[after]["host"], ways[after]["way"], seconds, look_around)
        channel.on_exit(link.socket.close)
        return link

    channel.post(_way_key(key, ranks[member]), {"way": listener.way, "host": channel.identity.host})
    ways = {rank: channel.wait_for(_way_key(key, rank), from_rank=rank) for rank in {before, after}}
    if not all(ways.values()):
        raise UnconnectedError
    downstream = reach() if member % 2 == 0 else None  # every other node, or all would wait for one another
    upstream = listener.accept(before, ways[before]["host"], look_around)
    channel.on_exit(upstream.socket.close)
    return upstream, downstream or reach()


def _way_key(key: str, rank: int) -> str:
    return f"{key}/way/{rank}"
