"""The order in which ranks pass bytes on."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rankload._relay.chain import Neighbours, neighbours

hosts_of_ranks = st.lists(st.integers(1, 8), min_size=1, max_size=12).map(
    lambda counts: [list(range(sum(counts[:n]), sum(counts[: n + 1]))) for n in range(len(counts))]
)


@given(hosts_of_ranks)
def test_every_rank_is_reached_once_and_each_host_by_one_link(hosts: list[list[int]]) -> None:
    host_of = {rank: number for number, ranks in enumerate(hosts) for rank in ranks}
    places = {rank: neighbours(hosts, rank) for rank in host_of}
    assert [rank for rank, place in places.items() if place.upstream is None] == [hosts[0][0]]
    reached = [(rank, downstream) for rank, place in places.items() for downstream in place.downstreams]
    assert Counter(downstream for _, downstream in reached) == Counter([*host_of][1:])
    assert all(places[downstream].upstream == rank for rank, downstream in reached)
    between = [
        (host_of[rank], host_of[downstream]) for rank, downstream in reached if host_of[rank] != host_of[downstream]
    ]
    assert between == [(number, number + 1) for number in range(len(hosts) - 1)]


def test_the_next_host_comes_before_the_own_one() -> None:
    hosts = [[3, 1], [0, 2, 4]]
    assert neighbours(hosts, 3) == Neighbours(None, (0, 1))
    assert neighbours(hosts, 0) == Neighbours(3, (2,))
    assert neighbours(hosts, 2) == Neighbours(0, (4,))
    assert neighbours(hosts, 4) == Neighbours(2, ())
    assert neighbours(hosts, 5) == Neighbours(None, ())  # takes no part
