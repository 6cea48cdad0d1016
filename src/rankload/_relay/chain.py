"""The order of the chain: who forwards to whom. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Neighbours:
    """A rank's place in the chain.

    Attributes:
        upstream: the rank that the bytes come from; None at the source.
        downstreams: those that they go on to, the next host first.
    """

    upstream: int | None
    downstreams: tuple[int, ...]


def neighbours(hosts: Sequence[Sequence[int]], rank: int) -> Neighbours:
    """Return a rank's place in a chain over hosts, whose first ranks each begin a chain within their host.

    So a byte crosses each link between hosts once, and a host of eight ranks makes the way of the bytes longer by one
    hop, not by eight.

    Args:
        hosts: the ranks that take part, by host; the first of the first is the source.
        rank: one of them.
    """
    for number, ranks in enumerate(hosts):
        if rank not in ranks:
            continue
        place = ranks.index(rank)
        next_here = tuple(ranks[place + 1 : place + 2])
        if place > 0:
            return Neighbours(ranks[place - 1], next_here)
        next_host = tuple(hosts[number + 1][:1]) if number + 1 < len(hosts) else ()
        return Neighbours(hosts[number - 1][0] if number else None, (*next_host, *next_here))
    return Neighbours(None, ())
