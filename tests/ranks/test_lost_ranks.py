"""A rank is killed or freezes: the others raise and name it, and the next run is clean."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from rank_functions import leftovers, load, outcomes, try_and_tell, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin, Reply
from harness.rank import mark_and_wait
from harness.ranks import RankGroup, agent_store, run_ranks, start_ranks, wait_until

pytestmark = pytest.mark.usefixtures("whole_exit")


def _hold_download(origin: Origin, file: CheckpointFile) -> str:
    return origin.add(file.name, file.path, Reply(hold_at=1000))


def _wait_for_partials(cache_dir: str, count: int = 1) -> None:
    wait_until(lambda: len(list(Path(cache_dir).rglob("*.partial"))) == count, 30, f"{count} partial files")
    wait_until(lambda: len(list(Path(cache_dir).rglob("*.lease"))) == count, 30, f"{count} leases")


def _assert_next_run_is_clean(origin: Origin, file: CheckpointFile, url: str, cache_dir: str) -> None:
    origin.add(file.name, file.path)
    results = run_ranks(load, 3, args=(url, cache_dir))
    assert [result.value for result in results] == [digest_of(file.content)] * 3
    assert leftovers(cache_dir) == []


def _survivors_of_leader(group: RankGroup, survivors: list[int], within_seconds: float, since: float) -> None:
    """Asserts that the others raised in time and named rank 0 and its host."""
    for outcome in outcomes([group.wait_for_end(rank, within_seconds + 10) for rank in survivors]):
        assert outcome.error in ("RankLostError", "StoreLostError")
        if outcome.error == "RankLostError":
            assert f"rank 0 (pid {group.pids[0]} on {socket.gethostname()})" in outcome.text
        else:
            assert "lost the store at 127.0.0.1:" in outcome.text and "rank 0's process" in outcome.text
        assert outcome.ended_at - since < within_seconds


@pytest.mark.fault(37)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_leader_lost_in_the_middle_of_its_download(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    short_deadlines: float,
    launcher: str,
    signum: signal.Signals,
) -> None:
    url = _hold_download(origin, checkpoint)
    with start_ranks(try_and_tell, 3, env=launcher, args=(url, cache_dir)) as group:
        group.wait_for_mark("waiting", [1, 2])
        _wait_for_partials(cache_dir)
        wait_until(lambda: "downloading" in group.stderr(1), 30, "rank 1 knows that rank 0 is downloading")
        group.kill(0, signum)
        _survivors_of_leader(group, [1, 2], short_deadlines, time.monotonic())
        if signum == signal.SIGSTOP:
            group.cont(0)
            if launcher == "env":  # its store was frozen with it: the others could not leave word
                origin.release(checkpoint.name)
            [leader] = outcomes([group.wait_for_end(0)])
            assert leader.error in ("RankLostError", "StoreLostError")
    _assert_next_run_is_clean(origin, checkpoint, url, cache_dir)


@pytest.mark.fault(37)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_waiting_rank_lost_while_rank_0_downloads(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float, signum: signal.Signals
) -> None:
    """A job that has lost a rank is over, however long its download would have taken; that is resumed by the next."""
    url = _hold_download(origin, checkpoint)
    with start_ranks(try_and_tell, 3, env="env", args=(url, cache_dir)) as group:
        _wait_for_partials(cache_dir)
        wait_until(lambda: all("downloading" in group.stderr(rank) for rank in (1, 2)), 30, "both wait")
        group.kill(2, signum)
        killed_at = time.monotonic()
        ended = outcomes([group.wait_for_end(rank, short_deadlines + 10) for rank in (0, 1)])
        group.kill(2)
    for outcome in ended:
        assert outcome.error == "RankLostError"
        assert f"rank 2 (pid {group.pids[2]} on {socket.gethostname()})" in outcome.text
        assert outcome.ended_at - killed_at < short_deadlines + 1
    _assert_next_run_is_clean(origin, checkpoint, url, cache_dir)


@pytest.mark.fault(37)
@pytest.mark.slow
def test_by_default_the_others_raise_within_thirty_seconds(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    url = _hold_download(origin, checkpoint)
    dirs = [str(tmp_path / name) for name in ("frozen host", "frozen", "killed")]
    with (
        start_ranks(try_and_tell, 2, env="env", args=(url, dirs[0])) as frozen_host,
        start_ranks(try_and_tell, 2, args=(url, dirs[1])) as frozen,
        start_ranks(try_and_tell, 2, args=(url, dirs[2])) as killed,
    ):
        groups = [frozen_host, frozen, killed]
        for group, cache_dir in zip(groups, dirs, strict=True):
            group.wait_for_mark("waiting", [1])
            _wait_for_partials(cache_dir)
        since = time.monotonic()
        frozen_host.stop(0)
        frozen.stop(0)
        killed.kill(0)
        for group in groups:
            _survivors_of_leader(group, [1], 30, since)


def _load_on_node(rank: int, url: str, model_dir: str, ranks_per_node: int) -> object:
    return try_and_tell(rank, url, f"{model_dir}/node{rank // ranks_per_node}")


@pytest.mark.fault(37)
@pytest.mark.parametrize(("world_size", "victim"), [(4, 0), (4, 2), (3, 0)])
def test_one_of_several_leaders_killed(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float, world_size: int, victim: int
) -> None:
    url = _hold_download(origin, checkpoint)
    per_node = 2 if world_size == 4 else 1
    nodes = world_size // per_node
    with start_ranks(_load_on_node, world_size, nodes=nodes, args=(url, cache_dir, per_node)) as group:
        _wait_for_partials(cache_dir, nodes)
        group.wait_for_mark("waiting", [rank for rank in range(world_size) if rank % per_node])  # all have joined
        group.kill(victim)
        killed_at = time.monotonic()
        ended = [group.wait_for_end(rank) for rank in range(world_size) if rank != victim]
    for outcome in outcomes(ended):
        assert outcome.error == "RankLostError", outcome
        assert f"rank {victim} (pid {group.pids[victim]} on {socket.gethostname()})" in outcome.text
        assert outcome.ended_at - killed_at < short_deadlines + 1


def _stand_still_in_map_location(rank: int, url: str, model_dir: str, victim: int) -> object:
    def map_location(storage: object, tag: str) -> object:
        mark_and_wait("loading")
        return storage

    return try_to_load(rank, url, model_dir, map_location=map_location if rank == victim else None)


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_a_rank_killed_while_it_loads_and_the_others_wait_for_the_verdict(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float, launcher: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_stand_still_in_map_location, 4, env=launcher, args=(url, cache_dir, 3)) as group:
        group.wait_for_mark("loading", [3])
        wait_until(lambda: "waiting for rank 3" in group.stderr(0), 30, "rank 0 waits for rank 3 alone")
        group.kill(3)
        killed_at = time.monotonic()
        ended = outcomes([group.wait_for_end(rank) for rank in (0, 1, 2)])
    assert [outcome.error for outcome in ended] == ["RankLostError"] * 3
    for outcome in ended:
        assert f"rank 3 (pid {group.pids[3]} on {socket.gethostname()})" in outcome.text
        assert outcome.ended_at - killed_at < short_deadlines


def _be_killed_in_a_warm_call(rank: int, url: str, model_dir: str, victim: int) -> object:
    def adapt(state_dict: dict[str, object]) -> dict[str, object]:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)  # as for memory
        return state_dict

    load(rank, url, model_dir)
    return try_to_load(rank, url, model_dir, adapt=adapt)


@pytest.mark.fault(37)
@pytest.mark.parametrize(("launcher", "victim"), [("torchrun", 0), ("torchrun", 2), ("env", 1)])
def test_a_rank_killed_in_a_warm_call_before_its_first_sign_of_life(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float, launcher: str, victim: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_be_killed_in_a_warm_call, 3, env=launcher, args=(url, cache_dir, victim)) as group:
        killed_at = group.wait_for_end(victim).ended_at
        ended = outcomes([group.wait_for_end(rank) for rank in range(3) if rank != victim])
    for outcome in ended:
        assert outcome.error == "RankLostError", outcome
        who = f"rank {victim} (pid {group.pids[victim]} on {socket.gethostname()})"
        assert f"{who} made the call and has given no sign of life" in outcome.text
        assert outcome.ended_at - killed_at < short_deadlines + 1


@pytest.mark.fault(39)
def test_the_agent_and_its_store_die(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(bytes_per_second=2000))
    with agent_store() as store, start_ranks(try_and_tell, 3, store=store, args=(url, cache_dir)) as group:
        group.wait_for_mark("waiting", [1, 2])
        _wait_for_partials(cache_dir)
        store.kill()
        killed_at = time.monotonic()
        ended = outcomes(group.wait())
    assert [outcome.error for outcome in ended] == ["StoreLostError"] * 3
    assert all(outcome.ended_at - killed_at < short_deadlines for outcome in ended)
    assert leftovers(cache_dir) == []
