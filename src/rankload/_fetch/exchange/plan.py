"""Decide which node fetches which part of a file from its origin. Pure.

The file is cut into units. A unit that some node has already is fetched by nobody; each other unit by one node. All
units go round a ring of the nodes, each as far as the first node that has it. So the origin serves the file once, and
each node receives from the ring what it neither has nor fetches: at most (N - 1) / N of the file if all N nodes fetch.

Nodes take turns, so that the front of the file is complete on every node as early as possible, and is hashed while the
rest arrives. A turn is a run of units, so that one request to the origin brings several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankload._platform.byte_ranges import ByteRanges

#: Size of a unit. It is forwarded when it is complete, so N nodes have the last one N small units late, not N large.
_UNIT_BYTES = 1 << 20

#: Most units of a file: each has an entry in a few tables.
_MAX_UNITS = 65536

#: Most ranges of missing units: a plan is a value in the store, and small. Beyond them, a unit that a node has may be
#: fetched once more.
_MAX_RUNS = 2000

#: Turns that each node takes at least, if there are as many units: nodes should end at about the same time.
_TURNS = 4


@dataclass(frozen=True)
class ExchangePlan:
    """Which node fetches which unit.

    Attributes:
        size_bytes: size of the file.
        unit_bytes: size of each unit but the last.
        turn_units: most units that a node fetches in one turn.
        ranks: the ranks that act for the nodes, in the order of the ring.
        fetchers: those of them that take turns.
        missing: ranges of units that no node has, in ascending order.
    """

    size_bytes: int
    unit_bytes: int
    turn_units: int
    ranks: tuple[int, ...]
    fetchers: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]

    @property
    def units(self) -> range:
        """Numbers of all units."""
        return range(count_units(self.size_bytes, self.unit_bytes))

    def span(self, unit: int) -> tuple[int, int]:
        """Return begin and end of a unit in the file, in bytes."""
        return unit * self.unit_bytes, min((unit + 1) * self.unit_bytes, self.size_bytes)

    def next(self, member: int) -> int:
        """Return the index of the node to which a node sends."""
        return (member + 1) % len(self.ranks)

    def fetched_by(self, member: int) -> list[int]:
        """Return the units that a node fetches from the origin, in ascending order."""
        if self.ranks[member] not in self.fetchers:
            return []
        place, turns = self.fetchers.index(self.ranks[member]), len(self.fetchers)
        missing = list(itertools.chain.from_iterable(itertools.starmap(range, self.missing)))
        first = range(place * self.turn_units, len(missing), turns * self.turn_units)
        return [unit for begin in first for unit in missing[begin : begin + self.turn_units]]


def unit_bytes_for(size_bytes: int, chunk_bytes: int) -> int:
    """Return the size of a unit: at most a chunk, but more where the file would have too many of them."""
    return max(min(_UNIT_BYTES, chunk_bytes), -(-size_bytes // _MAX_UNITS))


def count_units(size_bytes: int, unit_bytes: int) -> int:
    """Return the number of units of a file."""
    return -(-size_bytes // unit_bytes)


def units_within(spans: Iterable[tuple[int, int]], size_bytes: int, unit_bytes: int) -> frozenset[int]:
    """Return the units that lie in ranges of bytes as a whole."""
    found: set[int] = set()
    for begin, end in ByteRanges(spans):
        last = count_units(size_bytes, unit_bytes) if end >= size_bytes else end // unit_bytes
        found.update(range(count_units(begin, unit_bytes), last))
    return frozenset(found)


def make_plan(
    size_bytes: int, unit_bytes: int, chunk_bytes: int, ranks: Sequence[int], fetchers: Sequence[int],
    missing: Sequence[int],
) -> ExchangePlan | None:  # fmt: skip
    """Return a plan; None if units are missing that nobody can fetch.

    Args:
        size_bytes: size of the file.
        unit_bytes: size of a unit.
        chunk_bytes: about the size of a request to the origin.
        ranks: the ranks that act for the nodes, in the order of the ring.
        fetchers: those of them that reach the origin.
        missing: units that no node has, in ascending order.
    """
    if missing and not fetchers:
        return None
    turn_units = max(1, min(chunk_bytes // unit_bytes, len(missing) // (_TURNS * max(1, len(fetchers)))))
    runs = _without_small_gaps(_runs(missing), _MAX_RUNS)
    return ExchangePlan(size_bytes, unit_bytes, turn_units, tuple(ranks), tuple(fetchers), tuple(runs))


def _runs(units: Iterable[int]) -> list[tuple[int, int]]:
    """Return ascending units as ranges."""
    runs: list[tuple[int, int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit:
            runs[-1] = runs[-1][0], unit + 1
        else:
            runs.append((unit, unit + 1))
    return runs


def _without_small_gaps(runs: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return at most so many ranges that contain all ranges. What they contain beyond them is small."""
    if len(runs) <= most:
        return runs
    before = sorted(range(1, len(runs)), key=lambda index: runs[index - 1][1] - runs[index][0])
    starts = [0, *sorted(before[: most - 1]), len(runs)]
    return [(runs[first][0], runs[after - 1][1]) for first, after in itertools.pairwise(starts)]
