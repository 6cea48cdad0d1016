"""A job that a scheduler suspends, and processes that ranks fork."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from rank_functions import load, outcomes, try_and_tell

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin, Reply
from harness.rank import mark_and_wait
from harness.ranks import run_ranks, start_ranks, wait_until

pytestmark = pytest.mark.usefixtures("whole_exit")


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_a_job_suspended_for_longer_than_the_liveness_limit_succeeds(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    launcher: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANKLOAD_LIVENESS_SECONDS", "2")
    monkeypatch.setenv("RANKLOAD_HEARTBEAT_SECONDS", "0.2")
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(try_and_tell, 4, env=launcher, args=(url, cache_dir)) as group:
        group.wait_for_mark("waiting", [1, 2, 3])  # and no longer in torch's connect, which has a clock of its own
        wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 30, "a partial file")
        for rank in range(4):
            group.stop(rank)
        time.sleep(4)  # the suspension itself
        for rank in (2, 1, 3, 0):
            group.cont(rank)
        origin.release(checkpoint.name)
        results = group.wait()
    assert [outcome.digest for outcome in outcomes(results)] == [digest_of(checkpoint.content)] * 4


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_ranks_suspended_while_they_wait_for_rank_0_go_on_waiting(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    launcher: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANKLOAD_ARRIVAL_SECONDS", "8")
    monkeypatch.setenv("RANKLOAD_REPORT_SECONDS", "0.3")
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(load, 2, env=launcher, args=(url, cache_dir), held=[0]) as group:
        wait_until(lambda: "rank 0 has not made the call" in group.stderr(1), 30, "rank 1 waits")
        group.stop(1)
        time.sleep(9)  # the suspension itself
        group.cont(1)
        group.release(0)
        results = group.wait()
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 2


def _fork_between_calls(rank: int, urls: list[str], model_dir: str) -> list[str]:
    digests = [load(rank, urls[0], model_dir)]
    for url in urls[1:]:
        child = os.fork()
        if child == 0:  # as a DataLoader worker: it shares the parent's memory, and leaves without clean-up
            os._exit(0 if load(rank, urls[0], model_dir) == digests[0] else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        digests.append(load(rank, url, model_dir))
    return digests


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_a_call_in_a_forked_child_does_not_disturb_its_parents(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str, launcher: str
) -> None:
    files = [checkpoint, other_checkpoint, checkpoint]
    urls = [origin.add(file.name, file.path) for file in files]
    results = run_ranks(_fork_between_calls, 3, env=launcher, args=(urls, cache_dir))
    assert [result.value for result in results] == [[digest_of(file.content) for file in files]] * 3
    assert origin.request_count() == 2


class Weights(torch.utils.data.Dataset[str]):
    """Loads in the DataLoader's workers."""

    def __init__(self, url: str, model_dir: str) -> None:
        self.url, self.model_dir = url, model_dir

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> str:
        return load(-1, self.url, self.model_dir)


def _load_in_workers_first(rank: int, url: str, model_dir: str, context: str, *, in_group: bool) -> list[str]:
    if in_group:
        torch.distributed.init_process_group("gloo")
    loader = torch.utils.data.DataLoader(
        Weights(url, model_dir), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    loaded = list(loader) if rank == 0 else []
    mark_and_wait("workers")  # or rank 1 would wait for rank 0 while workers start
    return [*loaded, load(rank, url, model_dir)]


@pytest.mark.parametrize(("context", "in_group"), [("fork", False), ("fork", True), ("spawn", False)])
def test_dataloader_workers_do_not_take_the_place_of_their_rank(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    context: str,
    in_group: bool,
) -> None:
    monkeypatch.setenv("RANKLOAD_ARRIVAL_SECONDS", "10")
    url = origin.add(checkpoint.name, checkpoint.path)
    kwargs = {"in_group": in_group}
    with start_ranks(_load_in_workers_first, 2, args=(url, cache_dir, context), kwargs=kwargs) as group:
        group.wait_for_mark("workers", timeout_seconds=60)
        group.open_gate("workers")
        results = group.wait()
    assert [result.value for result in results] == [[digest_of(checkpoint.content)] * count for count in (5, 1)]
