"""Decide which node fetches which part of a file from its origin. Pure.

The file is cut into units. Each unit has an owner: a node that has it already, or else the node that fetches it. Units
then go round a ring of all nodes, from the owner to the node before it. So the origin serves the file once, and each
node receives from the ring what it neither has nor fetches: at most (N - 1) / N of the file if all N nodes fetch.

Owners take turns, unit by unit. So the front of the file is complete on every node as early as possible, and is hashed
while the rest arrives.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Most units of a file. A unit is held in memory while it is sent and received, so that units should be small.
_MAX_UNITS = 65536


@dataclass(frozen=True)
class RingMember:
    """A node that takes part.

    Attributes:
        rank: rank that acts for the node.
        held: numbers of the units that the node has already, of an earlier download.
        may_fetch: whether the node reaches the origin.
    """

    rank: int
    held: frozenset[int] = field(default_factory=frozenset)
    may_fetch: bool = True


@dataclass(frozen=True)
class ExchangePlan:
    """Which node brings which unit.

    Attributes:
        size_bytes: size of the file.
        unit_bytes: size of each unit but the last.
        members: the nodes, in the order of the ring.
        owners: index of the member that brings each unit.
    """

    size_bytes: int
    unit_bytes: int
    members: tuple[RingMember, ...]
    owners: tuple[int, ...]

    def span(self, unit: int) -> tuple[int, int]:
        """Return begin and end of a unit in the file, in bytes."""
        return unit * self.unit_bytes, min((unit + 1) * self.unit_bytes, self.size_bytes)

    def fetched_by(self, member: int) -> list[int]:
        """Return the units that a member fetches from the origin."""
        held = self.members[member].held
        return [unit for unit, owner in enumerate(self.owners) if owner == member and unit not in held]

    def received_by(self, member: int) -> list[int]:
        """Return the units that a member receives from the ring: all that it neither has nor fetches."""
        held = self.members[member].held
        return [unit for unit, owner in enumerate(self.owners) if owner != member and unit not in held]

    def sent_by(self, member: int) -> list[int]:
        """Return the units that a member sends to the next one in the ring."""
        return self.received_by(self.next(member))

    def next(self, member: int) -> int:
        """Return the member to which a member sends."""
        return (member + 1) % len(self.members)


def unit_bytes_for(size_bytes: int, chunk_bytes: int) -> int:
    """Return the size of a unit: a chunk, or more where the file would have too many of them."""
    return max(chunk_bytes, -(-size_bytes // _MAX_UNITS))


def make_plan(size_bytes: int, unit_bytes: int, members: Sequence[RingMember]) -> ExchangePlan | None:
    """Return a plan; None if nobody has a unit, and nobody can fetch it."""
    holders: dict[int, list[int]] = defaultdict(list)
    for index, member in enumerate(members):
        for unit in member.held:
            holders[unit].append(index)
    fetchers = itertools.cycle([index for index, member in enumerate(members) if member.may_fetch])
    owners = []
    for unit in range(-(-size_bytes // unit_bytes)):
        able = holders.get(unit)
        owner = able[unit % len(able)] if able else next(fetchers, None)
        if owner is None:
            return None
        owners.append(owner)
    return ExchangePlan(size_bytes, unit_bytes, tuple(members), tuple(owners))
