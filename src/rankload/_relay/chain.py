"""The order of the chain: which rank forwards to which. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Neighbours:
    """A rank's place in the chain.

    Attributes:
        upstream: rank that sends the bytes to this one; None at the source.
        downstreams: ranks that this one forwards the bytes to; the rank on the next host comes first.
    """

    upstream: int | None
    downstreams: tuple[int, ...]


def neighbours(hosts: Sequence[Sequence[int]], rank: int) -> Neighbours:
    """Return a rank's place in the chain.

    The first ranks of all hosts form a chain; each of them also starts a chain within its host. So a byte crosses each
    link between hosts once, and a host of eight ranks adds one hop, not eight, to the path to the next host.

    Args:
        hosts: participating ranks of each host; the first rank of the first host is the source.
        rank: a participating rank.
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
