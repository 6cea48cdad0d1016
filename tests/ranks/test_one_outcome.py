"""One outcome for all ranks, also where one stands still, dies or fails at the least likely moment."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from rank_functions import Outcome, at_store_operation, leftovers, load, outcomes, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.rank import mark, wait_for_gate
from harness.ranks import RankGroup, start_ranks, wait_until

pytestmark = pytest.mark.usefixtures("whole_exit")


def _once(action: Callable[[], None]) -> Callable[[], None]:
    left = [action]

    def first_time() -> None:
        if left:
            left.pop()()

    return first_time


def _stop() -> None:
    mark("stops")
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_until_stopped(group: RankGroup, rank: int) -> None:
    group.wait_for_mark("stops", [rank])

    def is_stopped() -> bool:
        with open(f"/proc/{group.pids[rank]}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"

    wait_until(is_stopped, 10, f"rank {rank} stands still")


# --- the verdict -----------------------------------------------------------------------------------------------------


def _stop_before_reading_the_verdict(rank: int, url: str, model_dir: str) -> Outcome:
    if rank != 1:
        return try_to_load(rank, url, model_dir)
    from rankload._coordination.verdict import Verdict

    count_through = Verdict.count_through

    def count_and_stop(verdict: Verdict) -> None:
        count_through(verdict)
        _stop()

    Verdict.count_through = count_and_stop  # type: ignore[method-assign]
    return try_to_load(rank, url, model_dir)


@pytest.mark.fault(78)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_rank_that_freezes_before_it_has_read_the_verdict_finds_it_when_it_wakes(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_stop_before_reading_the_verdict, 3, env=launcher, args=(url, cache_dir)) as group:
        _wait_until_stopped(group, 1)
        time.sleep(6)  # the freeze itself
        group.cont(1)
        ended = outcomes(group.wait())
    assert [outcome.digest for outcome in ended] == [digest_of(checkpoint.content)] * 3, ended


def _stop_before_voting(rank: int, url: str, model_dir: str) -> Outcome:
    """Rank 0 stops before its vote, when all others have voted: a rank that has not met it would not know of it."""

    def stop() -> None:
        wait_for_gate("all have voted")
        _stop()

    with at_store_operation("add", "/through", _once(stop if rank == 0 else lambda: mark("votes"))):
        return try_to_load(rank, url, model_dir)


def _wait_until_rank_0_stops(group: RankGroup) -> None:
    group.wait_for_mark("votes", [1, 2])
    group.open_gate("all have voted")
    _wait_until_stopped(group, 0)


@pytest.mark.fault(78)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_rank_0_that_freezes_before_its_vote_does_not_succeed_alone(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float, launcher: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_stop_before_voting, 3, env=launcher, args=(url, cache_dir)) as group:
        _wait_until_rank_0_stops(group)
        others = outcomes([group.wait_for_end(rank) for rank in (1, 2)])
        group.cont(0)
        [first] = outcomes([group.wait_for_end(0)])
    assert {outcome.error for outcome in others} <= {"StoreLostError", "RankLostError"}
    assert first.error in ("StoreLostError", "RankLostError"), first


def test_rank_0_that_freezes_for_less_than_the_limit_succeeds(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float
) -> None:
    """It asks the others for another sign of life first."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_stop_before_voting, 3, env="env", args=(url, cache_dir)) as group:
        _wait_until_rank_0_stops(group)
        time.sleep(0.55 * short_deadlines)  # the freeze itself
        group.cont(0)
        ended = outcomes(group.wait())
    assert [outcome.digest for outcome in ended] == [digest_of(checkpoint.content)] * 3, ended


# --- joining ---------------------------------------------------------------------------------------------------------


def _die_before_agreeing(rank: int, url: str, model_dir: str, victim: int) -> Outcome:
    from rankload._coordination.rank_channel import RankChannel

    def die(channel: RankChannel, arguments: dict[str, Any]) -> None:
        wait_until(channel._session.has_everybody, 30, "all have joined")
        _kill()

    if rank == victim:
        RankChannel.agree = die  # type: ignore[method-assign]
    return try_to_load(rank, url, model_dir)


@pytest.mark.fault(79)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
@pytest.mark.parametrize("victim", [0, 2])
def test_rank_that_dies_between_joining_and_agreeing(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float, launcher: str, victim: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_die_before_agreeing, 3, env=launcher, args=(url, cache_dir, victim)) as group:
        died_at = group.wait_for_end(victim).ended_at
        ended = outcomes([group.wait_for_end(rank) for rank in range(3) if rank != victim])
    for outcome in ended:
        assert outcome.error in ("RankLostError", "StoreLostError"), outcome
        assert outcome.ended_at - died_at < short_deadlines + 1


def _die_before_the_call(rank: int, url: str, model_dir: str) -> Outcome:
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 0:
        _kill()
    wait_for_gate("dead")
    return try_to_load(rank, url, model_dir)


@pytest.mark.fault(79)
def test_rank_0_that_dies_before_the_call_and_its_groups_store_with_it(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_die_before_the_call, 3, env="env", args=(url, cache_dir)) as group:
        group.wait_for_end(0)
        group.open_gate("dead")
        ended = outcomes([group.wait_for_end(rank) for rank in (1, 2)])
    for outcome in ended:
        assert outcome.error == "StoreLostError"
        assert "cannot reach the store of rank 0 on 127.0.0.1" in outcome.text and "refused" in outcome.text
        assert outcome.ended_at - outcome.started_at < 5


def _interrupted_while_waiting_for_rank_0(rank: int, url: str, model_dir: str) -> Outcome:
    def interrupt() -> None:
        wait_for_gate("interrupt")
        raise KeyboardInterrupt

    if rank != 1:
        with at_store_operation("peek", "/admission", _once(lambda: mark("waits"))):
            return try_to_load(rank, url, model_dir)
    with at_store_operation("peek", "/admission", interrupt), pytest.raises(KeyboardInterrupt):
        load(rank, url, model_dir)
    return Outcome(0, 0, None, "KeyboardInterrupt")


@pytest.mark.fault(79)
def test_ctrl_c_in_a_rank_that_is_joining_ends_the_others_that_wait(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_interrupted_while_waiting_for_rank_0, 3, args=(url, cache_dir), held=[0]) as group:
        group.wait_for_mark("waits", [2])
        interrupted_at = time.monotonic()
        group.open_gate("interrupt")
        interrupted, other = outcomes([group.wait_for_end(rank) for rank in (1, 2)])
    assert interrupted.error == "KeyboardInterrupt"
    assert other.error == "CallCancelledError" and "KeyboardInterrupt [rank 1 on " in other.text
    assert other.ended_at - interrupted_at < 3


@contextmanager
def _no_threads(name: str) -> Iterator[None]:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    threading.Thread.start = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


@contextmanager
def _no_descriptors() -> Iterator[None]:
    """Lets this process open nothing while it connects to rank 0's own store."""
    import rankload._coordination.rendezvous as session

    neighbour, limits = session.neighbour, resource.getrlimit(resource.RLIMIT_NOFILE)

    def connect(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, limits[1]))
        try:
            return neighbour(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    session.neighbour = connect
    try:
        yield
    finally:
        session.neighbour = neighbour


def _fail_to_join_and_try_again(rank: int, url: str, model_dir: str, failing: int, how: str) -> list[Outcome]:
    if rank == failing:
        with _no_descriptors() if how == "descriptors" else _no_threads(how):
            first = try_to_load(rank, url, model_dir)
    else:
        first = try_to_load(rank, url, model_dir)
    return [first, try_to_load(rank, url, model_dir)]


@pytest.mark.fault(79)
@pytest.mark.parametrize(
    ("launcher", "failing", "how"),
    [
        ("torchrun", 0, "rankload-rendezvous"),
        ("env", 0, "rankload-rendezvous"),
        ("torchrun", 1, "rankload-heartbeat"),
        ("env", 1, "descriptors"),
    ],
)
def test_rank_that_cannot_join_tells_the_others_and_the_next_call_succeeds(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str, failing: int, how: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_fail_to_join_and_try_again, 3, env=launcher, args=(url, cache_dir, failing, how)) as group:
        ended = [result.value for result in group.wait(90)]
        left_at = time.monotonic()
    expected = "StoreLostError" if how == "descriptors" else "RankFailedError"
    for first, second in ended:
        assert first.error == expected and f"[rank {failing} on " in first.text, first
        assert second.digest == digest_of(checkpoint.content), second
        assert left_at - second.ended_at < 20, "a process waited for readers of the failure that the next call overtook"
    assert leftovers(cache_dir) == []


def _fail_at_once_and_leave_the_group(rank: int, url: str, model_dir: str) -> Outcome:
    dist.init_process_group("gloo")
    if rank == 1:
        wait_for_gate("left")
    outcome = try_to_load(rank, url, model_dir, delivery="none of these")
    dist.destroy_process_group()
    mark("left")
    return outcome


@pytest.mark.fault(79)
def test_rank_0_that_fails_and_destroys_its_group_before_another_has_come(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_fail_at_once_and_leave_the_group, 2, args=(url, cache_dir)) as group:
        group.wait_for_mark("left", [0])
        group.open_gate("left")
        ended = outcomes(group.wait())
    assert [outcome.error for outcome in ended] == ["ArgumentError"] * 2, ended


def _play_a_job_of_eight(rank: int, url: str, model_dir: str) -> str:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    return load(rank, url, model_dir)


def test_fake_process_group_has_no_other_ranks(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_play_a_job_of_eight, 1, env="none", args=(url, cache_dir)) as group:
        [result] = group.wait()
    assert result.value == digest_of(checkpoint.content)
