"""Waits for a key that the server answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed import HashStore, TCPStore

from harness.waiting import wait_until
from rankload._coordination.awaited_key import GIVEN_UP, AwaitedKey
from rankload._coordination.store import RankStore, client_for_requests, connect
from rankload._settings import Settings


@pytest.fixture(params=[True, False], ids=["libuv", "no libuv"])
def store(request: pytest.FixtureRequest) -> Iterator[RankStore]:
    """A client of a server of either kind."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=request.param)
    yield connect("127.0.0.1", server.port, Settings(), dies_with_rank_0=True, limit_seconds=5)


def another(store: RankStore) -> RankStore:
    client = client_for_requests(store, Settings())
    assert client is not None
    return client


def arrives(awaited: AwaitedKey) -> bool:
    """Sleep as a waiting rank does."""

    def is_there_now() -> bool:
        awaited.sleep(0.01)
        return awaited.is_there()

    return bool(wait_until(is_there_now, 5, "the key is there"))


def count_peeks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    peeked: list[str] = []
    peek = RankStore.peek

    def counted(store: RankStore, key: str) -> str | None:
        peeked.append(key)
        return peek(store, key)

    monkeypatch.setattr(RankStore, "peek", counted)
    return peeked


def test_a_wait_reads_nothing_until_the_value_is_there(store: RankStore, monkeypatch: pytest.MonkeyPatch) -> None:
    peeked = count_peeks(monkeypatch)
    with AwaitedKey(store, another(store), "key", 0.05) as awaited:
        for _ in range(3):
            awaited.sleep(0.01)
            assert not awaited.is_there()
        assert store.peek_requested("key") is None  # as other ranks do, who look for a verdict
        store.settle("key", "value")
        assert arrives(awaited)
    assert (awaited.text, peeked) == ("value", [])
    assert store.peek_requested("key") == "value"


def test_a_rank_that_gives_up_wakes_the_others_and_can_wait_again(store: RankStore) -> None:
    waiting = another(store)
    with AwaitedKey(store, another(store), "key", 0.05) as of_another_rank:
        with pytest.raises(KeyboardInterrupt), AwaitedKey(store, waiting, "key", 0.05):
            raise KeyboardInterrupt
        assert arrives(of_another_rank) and of_another_rank.text == GIVEN_UP
    assert waiting._calls.ends_overdue_call(5)
    with AwaitedKey(store, waiting, "next", 0.05) as awaited:
        store.set("next", "value")
        assert arrives(awaited) and awaited.text == "value"


def test_giving_up_leaves_a_value_and_a_verdict_alone(store: RankStore) -> None:
    waiting = another(store)
    with pytest.raises(KeyboardInterrupt), AwaitedKey(store, waiting, "verdict", 0.05, is_write_once=True):
        raise KeyboardInterrupt
    assert store.peek_requested("verdict") is None
    with (
        pytest.raises(KeyboardInterrupt),
        AwaitedKey(store, waiting, "key", 0.05) as polling,
    ):  # the client is still blocked
        store.set("key", "value")
        raise KeyboardInterrupt
    assert polling.is_there() and polling.text == "value"


def test_in_a_store_without_a_server_a_wait_polls() -> None:
    store = RankStore(HashStore(), "memory", False, 5)
    with AwaitedKey(store, client_for_requests(store, Settings()), "key", 0.05) as awaited:
        assert not awaited.is_there()
        store.set("key", "value")
        assert arrives(awaited) and awaited.text == "value"
