"""Agreement on arguments by one counter."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed import HashStore

from rankload._coordination.agreement import Agreement
from rankload._coordination.store import RankStore
from rankload._types import Identity
from rankload.errors import ArgumentMismatchError


def ranks(world_size: int, *which: int) -> list[Agreement]:
    store = RankStore(HashStore(), "memory", False, 30)
    return [
        Agreement(store, str, Identity(rank, world_size, None, None, None, "here", "test"), 7)
        for rank in which or range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
def test_ranks_with_the_same_arguments_agree_in_any_order_of_keys(world_size: int) -> None:
    for index, rank in enumerate(ranks(world_size)):
        assert rank.enter({"url": "a", "scope": "b"} if index % 2 else {"scope": "b", "url": "a"})
        assert rank.look() == (index == world_size - 1)


@pytest.mark.parametrize("world_size", [2, 3, 1000, 1_000_000])
@pytest.mark.parametrize("other", [{"url": "b"}, {"url": "a", "scope": "b"}])
def test_the_first_rank_that_differs_sees_it(world_size: int, other: dict[str, Any]) -> None:
    first, differing = ranks(world_size, 1, 0)
    assert first.enter({"url": "a"})
    assert not differing.enter(other)
    first.support()
    with pytest.raises(ArgumentMismatchError, match=r"of call 7.*rank 1 has .*, rank 0 has 'b'"):
        differing.compare({"rank": 1, "host": "here", "arguments": {"url": "a"}})


def test_a_million_ranks_have_room_in_the_counter() -> None:
    [last] = ranks(1_000_000, 5)
    last.enter({"url": "a"})
    own = last._store.add("arrived", 0)
    last._store.add("arrived", 999_998 * own)
    assert last.enter({"url": "a"})
    assert last.look()
