"""Connect the participating ranks of a call in a chain."""

from __future__ import annotations

import logging
from contextlib import closing, suppress
from typing import Any

from rankload._coordination.channel import Channel
from rankload._platform.host import kernel_id
from rankload._relay.addresses import interfaces, own_addresses
from rankload._relay.chain import neighbours
from rankload._relay.links import Link, connect
from rankload._relay.listener import Listener
from rankload._relay.relay import Relay, Watch
from rankload._relay.seal import new_key
from rankload._settings import Settings
from rankload._types import Progress

_KEY = "relay"

_logger = logging.getLogger("rankload")


def open_relay(channel: Channel, source: int, settings: Settings, *, takes_part: bool) -> Relay | None:
    """Connect the participating ranks in a chain that starts at the source. Collective over the channel's ranks.

    The connections close when the call ends, after its verdict. So no rank mistakes a failing neighbour for a killed
    one.

    Args:
        channel: channel of the call. A call opens at most one relay.
        source: rank that has the bytes.
        settings: deadlines.
        takes_part: whether this rank wants the bytes; the source always takes part.

    Returns:
        This rank's relay; None if it does not take part.

    Raises:
        CoordinationError: a rank cannot be reached from its upstream neighbour.
        RankloadError: another rank failed.
    """
    rank = channel.identity.rank
    if rank == source:
        order = {"hosts": _gather(channel), "source_host": channel.identity.host, "key": new_key().hex()}
        channel.post(f"{_KEY}/order", order)
        return _connected(channel, order, None, settings)
    if not takes_part:
        channel.post(f"{_KEY}/{rank}", _member(channel, None))
        return None
    with closing(Listener(own_addresses(channel.store_host))) as listener:
        channel.post(f"{_KEY}/{rank}", _member(channel, listener))
        return _connected(channel, channel.wait_for(f"{_KEY}/order", from_rank=source), listener, settings)


def _member(channel: Channel, listener: Listener | None) -> dict[str, Any]:
    host = channel.identity.host
    return {"host": host, "machine": f"{kernel_id()}-{host}", "way": listener.way if listener else None}


def _gather(channel: Channel) -> list[list[int]]:
    """Return the participating ranks of each machine; the source's machine and the source come first."""
    source = channel.identity.rank
    by_machine = {_member(channel, None)["machine"]: [source]}
    for rank in range(channel.identity.world_size):
        if rank != source:
            member = _announced(channel, rank)
            if member["way"] is not None:
                by_machine.setdefault(member["machine"], []).append(rank)
    return list(by_machine.values())


def _connected(channel: Channel, order: dict[str, Any], listener: Listener | None, settings: Settings) -> Relay:
    """Connect to the neighbours, upstream first, so that a connecting rank gets its answer at once."""
    place = neighbours(order["hosts"], channel.identity.rank)
    watch: Watch = channel.watch_over([rank for rank in (place.upstream, *place.downstreams) if rank is not None])

    def look_around() -> None:
        watch(Progress("connecting"))

    links: list[Link] = []
    relays: list[Relay] = []
    channel.on_exit(lambda: _end(relays, links))
    upstream = None
    if listener is not None and place.upstream is not None:
        is_source = place.upstream == order["hosts"][0][0]
        host = order["source_host"] if is_source else _announced(channel, place.upstream)["host"]
        upstream = listener.accept(place.upstream, host, look_around)
        listener.close()
        links.append(upstream)
    downstreams: list[Link] = []
    for rank in place.downstreams:
        member = _announced(channel, rank)
        downstreams.append(connect(rank, member["host"], member["way"], settings.connect_seconds, look_around))
        links.append(downstreams[-1])
    relays.append(Relay(upstream, downstreams, watch, settings.progress_seconds, bytes.fromhex(order["key"])))
    return relays[0]


def _end(relays: list[Relay], links: list[Link]) -> None:
    """Close the connections, after a log line for each."""
    for relay in relays:
        _log(relay)
    for link in links:
        link.socket.close()


def _log(relay: Relay) -> None:
    """Log how many bytes came over which interface, and how fast."""
    if not _logger.isEnabledFor(logging.INFO) or not relay.bytes_passed:
        return
    by_address = {address: name for name, addresses in interfaces().items() for address in addresses}
    for link, what in [(relay.upstream, "from"), *((link, "to") for link in relay.downstreams)]:
        if link is None:
            continue
        with suppress(OSError):  # the connection broke
            own, port = link.socket.getsockname()[:2]
            rate = relay.bytes_passed / max(relay.seconds, 1e-3) / 1e6
            _logger.info(
                "rankload: %.1f MB %s rank %d on %s in %.1f s (%.0f MB/s) by %s (%s, port %d)",
                relay.bytes_passed / 1e6, what, link.rank, link.host, relay.seconds, rate,
                by_address.get(own, "?"), own, port,
            )  # fmt: skip


def _announced(channel: Channel, rank: int) -> dict[str, Any]:
    return channel.wait_for(f"{_KEY}/{rank}", from_rank=rank)
