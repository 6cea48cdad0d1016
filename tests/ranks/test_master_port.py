"""The address where rank 0 hosts its store: somebody else is there, or it cannot be found."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch.distributed as dist
from rank_functions import Outcome, at_store_operation, load, outcomes, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.rank import mark, wait_for_gate
from harness.ranks import agent_store, run_ranks, start_ranks

_CONNECT_SECONDS = 4.0


@pytest.fixture(autouse=True)
def short_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CONNECT_SECONDS", str(_CONNECT_SECONDS))


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port at which somebody listens who never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


def _all_fail_soon(url: str, cache_dir: str, world_size: int = 3, **variables: str) -> list[Outcome]:
    results = run_ranks(try_to_load, world_size, env="env", args=(url, cache_dir), rank_env=lambda rank: variables)
    ended = outcomes(results)
    for outcome in ended:
        assert outcome.error in ("CoordinationError", "StoreLostError"), outcome
        # promised are 2 s; the first call imports torch.distributed, on a machine that runs other tests
        assert outcome.ended_at - outcome.started_at < _CONNECT_SECONDS + 10, outcome
    return ended


@pytest.mark.fault(87)
def test_something_that_is_no_store_listens_at_the_port(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, silent_port: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    first, *others = _all_fail_soon(url, cache_dir, MASTER_PORT=str(silent_port))
    assert "the port is taken, probably by process " in first.text and str(os.getpid()) in first.text
    assert all("something else listens at that port" in outcome.text for outcome in others), others


@pytest.mark.fault(87)
def test_another_jobs_store_is_at_the_port(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with agent_store() as store:
        first, *others = _all_fail_soon(url, cache_dir, MASTER_PORT=str(store.port))
    assert "the port is taken, probably by process " in first.text
    assert all("is not one that rank 0 of this job hosts" in outcome.text for outcome in others), others


def _load_and_tell_port(rank: int, url: str, model_dir: str) -> str:
    with at_store_operation("add", "/join_requests", lambda: mark("hosts", os.environ["MASTER_PORT"])):
        return load(rank, url, model_dir)


@pytest.mark.fault(87)
def test_another_job_of_rankload_is_meeting_at_the_port(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_load_and_tell_port, 2, env="env", args=(url, cache_dir), held=[1]) as group:
        [port] = group.wait_for_mark("hosts", [0])
        first, *others = _all_fail_soon(url, cache_dir, MASTER_PORT=port)
        group.release(1)
        assert [result.value for result in group.wait()] == [digest_of(checkpoint.content)] * 2
    assert "the port is taken, probably by process " in first.text
    assert all("belongs to another job with 2 ranks" in outcome.text for outcome in others), others


@pytest.mark.fault(87)
@pytest.mark.parametrize("nowhere", ["no.such.host.invalid", "no..such.host"])
def test_rank_0_cannot_resolve_its_address_and_the_others_can(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, nowhere: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    rank_env = {0: {"MASTER_ADDR": nowhere}}
    ended = outcomes(run_ranks(try_to_load, 3, env="env", args=(url, cache_dir), rank_env=rank_env))
    for outcome in ended:
        assert outcome.error == "CoordinationError"
        assert f"rank 0 cannot open a store at {nowhere}" in outcome.text
        assert outcome.ended_at - outcome.started_at < 15  # a name server may be slow to say so


@pytest.mark.fault(87)
@pytest.mark.parametrize("nowhere", ["no.such.host.invalid", f"{'n' * 64}.host"])  # the second is no name in DNS
def test_nobody_can_resolve_the_address(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, nowhere: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    first, *others = outcomes(
        run_ranks(
            try_to_load,
            3,
            env="env",
            args=(url, cache_dir),
            # rank 0 exits when all others have read the reason, or after the liveness limit
            rank_env=lambda rank: {"MASTER_ADDR": nowhere, "RANKLOAD_LIVENESS_SECONDS": "3"},
        )
    )
    assert first.error == "CoordinationError" and "Set MASTER_ADDR" in first.text
    for outcome in others:
        assert outcome.error == "CoordinationError" and f"cannot resolve {nowhere}" in outcome.text
        assert outcome.ended_at - outcome.started_at < _CONNECT_SECONDS + 15


@pytest.mark.fault(87)
@pytest.mark.parametrize("port", ["0", "65536", "1" * 30])
def test_port_that_is_none(origin: Origin, checkpoint: CheckpointFile, cache_dir: str, port: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(try_to_load, 3, env="env", args=(url, cache_dir), rank_env=lambda rank: {"MASTER_PORT": port})
    for outcome in outcomes(results):
        assert outcome.error == "ArgumentError" and f"MASTER_PORT='{port}': expected a port" in outcome.text
    assert origin.request_count() == 0


def _fork_while_meeting(rank: int, url: str, model_dir: str) -> str:
    def fork() -> None:
        if os.fork() == 0:
            wait_for_gate("end")
            os._exit(0)

    if rank == 0:
        with at_store_operation("add", "/join_requests", fork):
            digest = load(rank, url, model_dir)
    else:
        digest = load(rank, url, model_dir)
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    return digest


def test_forked_child_does_not_keep_the_port(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_fork_while_meeting, 2, env="env", args=(url, cache_dir)) as group:
        try:
            assert [result.value for result in group.wait()] == [digest_of(checkpoint.content)] * 2
        finally:
            group.open_gate("end")
