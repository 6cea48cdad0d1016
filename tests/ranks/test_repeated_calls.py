"""Calls in a row: they never mix, and a warm one costs next to nothing."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from rank_functions import at_store_operation, load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.rank import mark, mark_and_wait
from harness.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.usefixtures("whole_exit")


def _alternate(rank: int, urls: list[str], model_dir: str) -> list[str]:
    return [load(rank, urls[turn % 2], model_dir) for turn in range(8)]


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_calls_for_two_urls_in_turn_never_mix(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str, launcher: str
) -> None:
    files = [checkpoint, other_checkpoint]
    urls = [origin.add(file.name, file.path) for file in files]
    results = run_ranks(_alternate, 4, env=launcher, args=(urls, cache_dir))
    assert [result.value for result in results] == [[digest_of(file.content) for file in files] * 4] * 4
    assert [origin.request_count(file.name) for file in files] == [1, 1]


def _count_operations(rank: int, url: str, model_dir: str, calls: int) -> tuple[list[int], list[float]]:
    """Returns, for each warm call, the store operations that were not polls, and the seconds."""
    from rankload._coordination.store import RankStore
    from rankload._fetch import cache_domain

    counted = 0

    def count(method: str, is_poll: Any) -> None:
        original = getattr(RankStore, method)

        def operation(store: RankStore, key: str, *values: Any) -> Any:
            nonlocal counted
            result = original(store, key, *values)
            counted += not is_poll(result, *values)
            return result

        setattr(RankStore, method, operation)

    cache_domain.is_node_local = lambda directory: False  # the machine's own disk stands for a file server
    load(rank, url, model_dir)
    count("peek", lambda result: result is None)
    count("request", lambda result: False)
    count("add", lambda result, *amount: amount == (0,))
    count("set", lambda result, *value: False)
    count("set_first", lambda result, *value: False)
    operations, seconds = [], []
    for _ in range(calls):
        counted, started = 0, time.perf_counter()
        load(rank, url, model_dir)
        seconds.append(time.perf_counter() - started)
        operations.append(counted)
    return operations, seconds


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_twenty_warm_calls_cost_each_rank_at_most_six_store_operations(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    launcher: str,
    nodes: int,
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_count_operations, 4, env=launcher, nodes=nodes, args=(url, cache_dir, 20))
    operations = [max(call) for call in zip(*(result.value[0] for result in results), strict=True)]
    slowest = [max(call) for call in zip(*(result.value[1] for result in results), strict=True)]
    print("slowest rank of a warm call: median", sorted(slowest)[10], "worst", max(slowest))
    assert sorted(slowest)[10] < 0.25
    # a rank that other work slows down to its first heartbeat tells the others that it lives
    assert max(count for count, seconds in zip(operations, slowest, strict=True) if seconds < 0.25) <= 6, operations
    assert origin.request_count() == 1


def _leave_at_once(rank: int, url: str, model_dir: str) -> None:
    load(rank, url, model_dir)
    if rank == 0:
        mark("through")
        os._exit(0)  # no atexit handler keeps the store open


def _read_the_verdict_late(rank: int, url: str, model_dir: str) -> None:
    if rank == 2:
        with at_store_operation("add", "/seen", lambda: mark_and_wait("verdict")):
            load(rank, url, model_dir)
    else:
        _leave_at_once(rank, url, model_dir)


def test_the_stores_host_outlasts_a_rank_that_is_slow_to_read_the_verdict(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_read_the_verdict_late, 3, env="env", args=(url, cache_dir)) as group:
        group.wait_for_mark("verdict", [2])
        group.wait_for_end(1)  # it has read the verdict: rank 0 could leave as well
        assert group.is_alive(0)
        group.open_gate("verdict")
        results = group.wait()
    assert [result.exitcode for result in results] == [0, 0, 0], results[2].describe()


@pytest.mark.slow
def test_ranks_that_exit_right_after_the_call_never_lose_the_store(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    for _ in range(10):
        groups = [start_ranks(_leave_at_once, 2, env="env", args=(url, cache_dir)) for _ in range(5)]
        for group in groups:
            with group:
                results = group.wait()
            assert [result.exitcode for result in results] == [0, 0], results[1].describe()
