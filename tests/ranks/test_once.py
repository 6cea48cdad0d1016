"""`dist_once` and `local_once`: one run for all, its value or its error everywhere, and a stamp for the next job."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_functions import at_store_operation, marking

import rankload
from harness.rank import mark, mark_and_wait, wait_for_gate
from harness.ranks import run_ranks, start_ranks, wait_until


def _noting(log: str, value: Any) -> Callable[[], Any]:
    """Makes a function that notes its runs in a file, one line each."""

    def function() -> Any:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return value

    return function


def _runs(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def _once(rank: int, log: str, directories: list[str], value: Any, **arguments: Any) -> Any:
    directory = directories[rank % len(directories)]
    return rankload.dist_once(_noting(log, value), key="task", directory=directory, **arguments)


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_one_run_for_all_ranks_and_none_in_the_next_job(tmp_path: Path, launcher: str) -> None:
    log, value = tmp_path / "log", {"classes": ["a", "b"], "size": 3}
    for _ in range(2):
        results = run_ranks(_once, 4, env=launcher, args=(str(log), [str(tmp_path / "data")], value))
        assert [result.value for result in results] == [value] * 4
        assert _runs(log) == 1


def test_again_when_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for runs in (1, 2):
        results = run_ranks(_redone, 3, args=(str(log), [str(tmp_path / "data")], runs))
        assert [result.value for result in results] == [runs] * 3
        assert _runs(log) == runs


def _redone(rank: int, log: str, directories: list[str], value: Any) -> Any:
    return _once(rank, log, directories, value, redo=True)


def test_nodes_with_directories_of_their_own_run_it_once_each(tmp_path: Path) -> None:
    log, directories = (
        tmp_path / "log",
        [str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "b")],
    )
    results = run_ranks(_once, 4, nodes=2, args=(str(log), directories, "value"))
    assert [result.value for result in results] == ["value"] * 4
    assert _runs(log) == 2


@pytest.mark.fault(88)
def test_a_path_that_is_gone_is_prepared_anew(tmp_path: Path) -> None:
    log, made = tmp_path / "log", tmp_path / "made"
    for runs, is_there in ((1, True), (1, True), (2, False)):
        made.mkdir(exist_ok=True) if is_there else made.rmdir()
        results = run_ranks(_once, 2, args=(str(log), [str(tmp_path / "data")], made))
        assert [result.value for result in results] == [made] * 2
        assert _runs(log) == runs


def _fail(rank: int, directory: str) -> None:
    def function() -> Any:
        raise LookupError("no such dataset")

    rankload.dist_once(function, key="task", directory=directory)


def test_its_error_is_everybodys_and_leaves_no_stamp(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    for result in run_ranks(_fail, 3, args=(data,)):
        assert result.exception is not None
        assert result.exception.type_name == "RankFailedError"
        assert "LookupError: no such dataset" in result.exception.message
    results = run_ranks(_once, 3, args=(str(tmp_path / "log"), [data], 1))
    assert [result.value for result in results] == [1] * 3


@pytest.mark.parametrize(
    "value",
    [{1, 2}, (1, 2), float("nan"), {1: 2}, "x" * 70_000, object()],
    ids=["set", "tuple", "nan", "integer key", "long", "object"],
)
def test_a_value_that_ranks_cannot_share_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(rankload.ArgumentError, match="return a Path, or what JSON can hold"):
        rankload.dist_once(lambda: value, key="task", directory=tmp_path)
    assert rankload.dist_once(lambda: [1], key="task", directory=tmp_path) == [1]


@pytest.mark.parametrize(
    "arguments", [{"key": ""}, {"key": "x", "scope": "rack"}, {"key": "x", "timeout": -1}], ids=str
)
def test_arguments(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(rankload.ArgumentError, match=list(arguments)[-1]):
        rankload.dist_once(lambda: None, directory=tmp_path, **arguments)


def _other_key(rank: int, directory: str) -> None:
    rankload.dist_once(lambda: None, key=f"task{rank}", directory=directory)


def test_ranks_that_prepare_different_things_disagree(tmp_path: Path) -> None:
    for result in run_ranks(_other_key, 2, args=(str(tmp_path),)):
        assert result.exception is not None and result.exception.type_name == "ArgumentMismatchError"


def _held(rank: int, log: str, directory: str) -> Any:
    def function() -> str:
        mark_and_wait("runs")
        return _noting(log, "done")()

    with at_store_operation("request", "/once/", marking("waiting")):
        return rankload.dist_once(function, key="task", directory=directory)


def test_two_jobs_at_once_share_one_run(tmp_path: Path, short_deadlines: float) -> None:
    log, data = tmp_path / "log", str(tmp_path / "data")
    with start_ranks(_held, 2, args=(str(log), data)) as first:
        first.wait_for_mark("runs", [0])
        assert list((tmp_path / "data").rglob("*.lease"))
        with start_ranks(_held, 2, args=(str(log), data)) as second:
            first.open_gate("runs")
            second.open_gate("runs")  # if it came to that
            results = [*first.wait(), *second.wait()]
    assert [result.value for result in results] == ["done"] * 4
    assert _runs(log) == 1


@pytest.mark.fault(88)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_leader_that_dies_in_it_is_named_and_the_next_job_runs_it(
    tmp_path: Path, short_deadlines: float, signum: signal.Signals
) -> None:
    log, data = tmp_path / "log", str(tmp_path / "data")
    with start_ranks(_held, 3, args=(str(log), data)) as group:
        group.wait_for_mark("runs", [0])
        group.wait_for_mark("waiting", [1, 2])
        group.kill(0, signum)
        for rank in (1, 2):
            error = group.wait_for_end(rank, short_deadlines + 20).exception
            assert error is not None and error.type_name in ("RankLostError", "CallCancelledError", "StoreLostError")
    assert _runs(log) == 0
    results = run_ranks(_once, 3, args=(str(log), [data], "done"))
    assert [result.value for result in results] == ["done"] * 3


def _in_steps(rank: int, directory: str, steps: int) -> Any:
    def function(progress: Callable[[], None]) -> str:
        for _ in range(steps):
            progress()
        if not steps:
            mark("stuck")
            wait_for_gate("on")
        return "done"

    return rankload.dist_once(function, key="task", directory=directory, timeout=0.5)


def test_steps_are_progress(tmp_path: Path) -> None:
    results = run_ranks(_in_steps, 2, args=(str(tmp_path), 10))
    assert [result.value for result in results] == ["done"] * 2


def test_a_function_without_a_step_in_time_ends_the_call(tmp_path: Path) -> None:
    with start_ranks(_in_steps, 2, args=(str(tmp_path), 0)) as group:
        group.wait_for_mark("stuck", [0])
        error = group.wait_for_end(1).exception
        assert error is not None and error.type_name == "ProgressTimeoutError"
        assert "while preparing" in error.message
        group.open_gate("on")
        assert group.wait_for_end(0).exception is not None


def _locally(rank: int, log: str, directory: str) -> Any:
    def function() -> str:
        mark_and_wait("runs")
        return _noting(log, "done")()

    return rankload.local_once(function, key="task", directory=directory)


@pytest.mark.parametrize("launcher", ["none", "torchrun"])
def test_processes_that_come_when_they_like_share_one_run(tmp_path: Path, launcher: str) -> None:
    log = tmp_path / "log"
    with start_ranks(_locally, 4, env=launcher, args=(str(log), str(tmp_path / "data"))) as group:
        wait_until(lambda: list((tmp_path / "data").rglob("*.lease")), 30, "a lease")
        group.open_gate("runs")
        results = group.wait()
    assert [result.value for result in results] == ["done"] * 4
    assert _runs(log) == 1


def test_a_local_error_is_the_callers_own_and_the_next_one_tries_again(tmp_path: Path) -> None:
    def fail() -> None:
        raise LookupError("no such dataset")

    with pytest.raises(LookupError, match="no such dataset"):
        rankload.local_once(fail, key="task", directory=tmp_path)
    assert rankload.local_once(lambda: 3, key="task", directory=tmp_path) == 3
    assert rankload.local_once(fail, key="task", directory=tmp_path) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_stamp_of_another_user_does_not_count(tmp_path: Path) -> None:
    assert rankload.local_once(lambda: "ours", key="task", directory=tmp_path) == "ours"
    [stamp] = (tmp_path / ".rankload" / "once").glob("*.json")
    os.chown(stamp, 12345, 12345)
    assert rankload.local_once(lambda: "anew", key="task", directory=tmp_path) == "anew"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[",
        '{"key": "task", "run_id": "1", "value": {"kind": "path"}}',
        "null",
        '{"key": "task", "value": []}',
        '{"key": "task", "run_id": "1", "value": {"kind": "json", "value": 3}, "job": null, "number": Infinity}',
    ],
)
def test_a_stamp_that_makes_no_sense_does_not_count(tmp_path: Path, content: str) -> None:
    assert rankload.local_once(lambda: 1, key="task", directory=tmp_path) == 1
    [stamp] = (tmp_path / ".rankload" / "once").glob("*.json")
    stamp.write_text(content)
    assert rankload.local_once(lambda: 2, key="task", directory=tmp_path) == 2
