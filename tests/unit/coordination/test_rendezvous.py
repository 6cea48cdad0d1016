"""How ranks meet: whom rank 0 welcomes, and what of a store's past is believed. Threads over a store in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from harness.ranks import wait_until
from rankload._coordination.rendezvous import Calls, Session, join
from rankload._coordination.store import RankStore
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ArrivalTimeoutError

WELCOME = "rankload/group/admission"


@pytest.fixture
def store() -> RankStore:
    return RankStore(HashStore(), "memory", False, 30)


@pytest.fixture
def meet(store: RankStore) -> Iterator[Callable[..., Session]]:
    """Joins as a rank of three; what is left of rank 0's greeters ends with the test."""
    sessions: list[Session] = []

    def as_rank(rank: int, arrival_seconds: float = 20) -> Session:
        identity = Identity(rank, 3, rank, 3, 0, "host", "test")
        sessions.append(join(store, identity, "group", replace(Settings(), arrival_seconds=arrival_seconds), Calls(1)))
        return sessions[-1]

    yield as_rank
    for session in sessions:
        if session.rendezvous_host is not None:
            session.rendezvous_host.stop()


def test_all_ranks_get_the_session_whoever_comes_first(store: RankStore, meet: Callable[..., Session]) -> None:
    with ThreadPoolExecutor() as pool:
        early = pool.submit(meet, 2)
        wait_until(lambda: store.peek("rankload/group/join_requests") is not None, 10, "a hello")
        first = meet(0)
        assert {early.result().prefix, meet(1).prefix} == {first.prefix}
    wait_until(first.has_left_rendezvous, 10, "the end of the greeter")


def test_the_welcome_of_a_former_job_is_not_believed(store: RankStore, meet: Callable[..., Session]) -> None:
    for _ in range(5):
        store.add("rankload/group/join_requests")
    store.set(WELCOME, "5 former -")
    with pytest.raises(ArrivalTimeoutError):
        meet(1, arrival_seconds=0.5)
    assert meet(0).prefix == meet(1).prefix == meet(2).prefix != "rankload/group/former"


def test_a_welcome_that_comes_late_from_a_former_job_is_put_right(
    store: RankStore, meet: Callable[..., Session]
) -> None:
    first = meet(0)
    wait_until(lambda: store.peek(WELCOME) is not None, 10, "a welcome")
    store.set(WELCOME, "0 former -")
    wait_until(lambda: "former" not in str(store.peek(WELCOME)), 10, "another welcome")
    assert meet(1).prefix == first.prefix
