"""A job started again over the store of the one before: nothing that it left is taken for news."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from rank_functions import at_store_operation, leftovers, load, marking, try_and_tell, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin, Reply
from harness.rank import mark, wait_for_gate
from harness.ranks import agent_store, run_ranks, start_ranks, wait_until

pytestmark = pytest.mark.usefixtures("whole_exit")


def _unequal_restart_counts(rank: int) -> dict[str, str]:
    return {"TORCHELASTIC_RESTART_COUNT": str(rank // 2), "TORCHELASTIC_MAX_RESTARTS": "3"}


def _load_twice(rank: int, url: str, model_dir: str) -> list[str]:
    return [load(rank, url, model_dir) for _ in range(2)]


@pytest.mark.fault(42)
def test_after_a_job_that_went_well_with_unequal_restart_counts(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str
) -> None:
    with agent_store() as store:
        for file in (checkpoint, other_checkpoint):
            url = origin.add(file.name, file.path)
            results = run_ranks(_load_twice, 4, store=store, args=(url, cache_dir), rank_env=_unequal_restart_counts)
            assert [result.value for result in results] == [[digest_of(file.content)] * 2] * 4
    assert origin.request_count() == 2


def _hello(rank: int, url: str, model_dir: str) -> None:
    with at_store_operation("peek", "/admission", marking("hello")):
        load(rank, url, model_dir)


@pytest.mark.fault(42)
def test_after_a_job_that_was_killed_while_its_ranks_met(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with agent_store() as store:
        with start_ranks(_hello, 4, store=store, args=(url, cache_dir), held=[0]) as group:
            group.wait_for_mark("hello", [1, 2, 3])
        results = run_ranks(load, 4, store=store, args=(url, cache_dir), rank_env=_unequal_restart_counts)
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 4
    assert origin.request_count() == 1


@pytest.mark.fault(42)
def test_after_a_job_that_was_killed_in_the_middle_of_a_call(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000), Reply())
    with agent_store() as store:
        with start_ranks(load, 4, store=store, args=(url, cache_dir)):
            origin.wait_until_held(checkpoint.name)
            wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 10, "a partial file")
        results = run_ranks(load, 4, store=store, args=(url, cache_dir), rank_env=_unequal_restart_counts)
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 4
    assert (origin.request_count(), origin.completed_count()) == (2, 1)
    assert leftovers(cache_dir) == []


@pytest.mark.fault(42)
def test_a_smaller_job_after_a_bigger_one(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with agent_store() as store:
        for world_size in (4, 2, 3):
            results = run_ranks(load, world_size, store=store, args=(url, cache_dir))
            assert [result.value for result in results] == [digest_of(checkpoint.content)] * world_size


def _namesakes(rank: int, url: str, model_dir: str) -> str:
    _init_process_group(rank, "first")
    if rank == 0:  # alone: rank 1 does not make this call, so rank 0 goes on answering hellos
        alone = try_to_load(rank, url, model_dir)
        assert alone.error == "ArrivalTimeoutError", alone
        mark("alone")
        os.environ["RANKLOAD_ARRIVAL_SECONDS"] = "8"  # as rank 1's
    wait_for_gate("next group")
    dist.destroy_process_group()
    _init_process_group(rank, "second")
    if rank == 0:
        wait_for_gate("call")
        return load(rank, url, model_dir)
    with at_store_operation("peek", "/admission", marking("hello")):
        return load(rank, url, model_dir)


def _init_process_group(rank: int, prefix: str) -> None:
    # gloo's own keys need a prefix of their own: it cannot be initialised twice over the agent's store (torch 2.13)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(prefix, store), rank=rank, world_size=2)


def test_a_group_does_not_get_the_session_of_a_destroyed_namesake(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKLOAD_ARRIVAL_SECONDS", "8")
    quick = {0: {"RANKLOAD_ARRIVAL_SECONDS": "1"}}
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_namesakes, 2, args=(url, cache_dir), rank_env=quick) as group:
        group.wait_for_mark("alone", [0])
        group.open_gate("next group")
        group.wait_for_mark("hello", [1])
        time.sleep(1)  # for whoever of the first group might still answer: it looks four times a second
        group.open_gate("call")
        results = group.wait()
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 2


def _call_again_when_told(rank: int, url: str, model_dir: str) -> tuple[str, str | None, str | None]:
    first = try_to_load(rank, url, model_dir)
    if rank == 0:
        return first.digest or "", None, None
    mark("first")
    wait_for_gate("rank 0 is gone")
    lost = try_to_load(rank, url, model_dir)
    mark("lost")
    wait_for_gate("rank 0 is back")
    return first.digest or "", lost.error, try_to_load(rank, url, model_dir).digest


def _come_back(rank: int, url: str, model_dir: str) -> str:
    return load(rank, url, model_dir)


@pytest.mark.fault(39)
def test_ranks_that_outlive_rank_0_and_its_store_meet_its_successor(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, tmp_path: Path
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_call_again_when_told, 3, env="env", args=(url, cache_dir)) as group:
        group.wait_for_mark("first", [1, 2])
        environment = group._environments[0]
        group.wait_for_end(0)
        group.open_gate("rank 0 is gone")
        group.wait_for_mark("lost", [1, 2])
        group.open_gate("rank 0 is back")
        [successor] = run_ranks(_come_back, 1, env=lambda rank: environment, args=(url, cache_dir))
        results = group.wait()
    digest = digest_of(checkpoint.content)
    assert successor.value == digest
    assert [result.value for result in results[1:]] == [(digest, "StoreLostError", digest)] * 2


def _load_again_when_told(rank: int, urls: list[str], model_dir: str) -> list[str | None]:
    first = try_and_tell(rank, urls[0], model_dir)
    mark("first", first.error)
    wait_for_gate("again")
    return [try_to_load(rank, url, model_dir).digest for url in urls]


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_after_a_call_in_which_rank_0_was_frozen_all_ranks_meet_again(
    origin: Origin,
    checkpoint: CheckpointFile,
    other_checkpoint: CheckpointFile,
    cache_dir: str,
    short_deadlines: float,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
) -> None:
    monkeypatch.setenv("RANKLOAD_ARRIVAL_SECONDS", "20")
    files = [checkpoint, other_checkpoint]
    urls = [origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000), Reply())]
    urls.append(origin.add(other_checkpoint.name, other_checkpoint.path))
    with start_ranks(_load_again_when_told, 3, env=launcher, args=(urls, cache_dir)) as group:
        group.wait_for_mark("waiting", [1, 2])
        wait_until(lambda: all("downloading" in group.stderr(rank) for rank in (1, 2)), 30, "both wait for rank 0")
        group.stop(0)
        lost = group.wait_for_mark("first", [1, 2])
        group.cont(0)
        origin.release(checkpoint.name)
        assert {*lost, *group.wait_for_mark("first", [0])} <= {"StoreLostError", "RankLostError"}
        group.open_gate("again")
        results = group.wait()
    assert [result.value for result in results] == [[digest_of(file.content) for file in files]] * 3
