"""One rank fails: all do, with the first cause, at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
from rank_functions import Outcome, leftovers, load, outcomes, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.usefixtures("whole_exit")


@pytest.mark.fault(11)
@pytest.mark.fault(36)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_the_leader_gets_a_404_and_every_rank_raises_it_within_two_seconds(
    origin: Origin, cache_dir: str, launcher: str
) -> None:
    ended = outcomes(run_ranks(try_to_load, 4, env=launcher, args=(origin.url("nothing.pth"), cache_dir)))
    assert {(outcome.error, outcome.text_everywhere) for outcome in ended} == {("HTTPStatusError", ended[0].text)}
    assert "HTTP Error 404" in ended[0].text and "[rank 0 on " in ended[0].text
    assert max(outcome.ended_at for outcome in ended) - max(outcome.started_at for outcome in ended) < 2
    assert origin.request_count() == 1
    assert leftovers(cache_dir) == []


@pytest.mark.fault(36)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_a_rank_that_comes_after_rank_0_has_failed_and_left_still_learns_why(
    origin: Origin, cache_dir: str, launcher: str
) -> None:
    with start_ranks(try_to_load, 3, env=launcher, args=(origin.url("nothing.pth"), cache_dir), held=[2]) as group:
        group.wait_for_mark("tried", [0])
        group.release(2)
        ended = outcomes(group.wait())
    assert [outcome.error for outcome in ended] == ["HTTPStatusError"] * 3
    assert ended[2].ended_at - ended[2].started_at < 5


def _raise(error: BaseException) -> Any:
    def map_location(storage: Any, tag: str) -> Any:
        raise error

    return map_location


def _one_rank_fails(rank: int, url: str, model_dir: str, failing: int, error: BaseException) -> list[Outcome]:
    first = try_to_load(rank, url, model_dir, map_location=_raise(error) if rank == failing else None)
    return [first, try_to_load(rank, url, model_dir)]


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ValueError("no such layer"), id="any"),
        pytest.param(MemoryError("no memory left"), id="memory", marks=pytest.mark.fault(40)),
    ],
)
def test_one_rank_cannot_load_and_every_rank_names_it(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, failing: int, error: Exception
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_one_rank_fails, 4, args=(url, cache_dir, failing, error))
    firsts = [result.value[0] for result in results]
    assert len({(outcome.error, outcome.text_everywhere) for outcome in firsts}) == 1, firsts
    assert firsts[0].error is not None and str(error) in firsts[0].text
    assert f"[rank {failing} on " in firsts[0].text
    assert [outcome.text == outcome.text_everywhere for outcome in firsts] == [rank == failing for rank in range(4)]
    assert [result.value[1].digest for result in results] == [digest_of(checkpoint.content)] * 4


def _load_without_threads(rank: int, url: str, model_dir: str) -> tuple[Outcome, bool, Outcome]:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "rankload-heartbeat":
            raise RuntimeError("can't start new thread")
        start(thread)

    if rank == 1:
        threading.Thread.start = refuse  # type: ignore[method-assign]
    first = try_to_load(rank, url, model_dir)
    threading.Thread.start = start  # type: ignore[method-assign]
    return first, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, try_to_load(rank, url, model_dir)


def test_a_rank_that_cannot_begin_the_call_says_so_and_leaves_nothing_behind(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    for result in run_ranks(_load_without_threads, 3, args=(url, cache_dir)):
        first, is_default, second = result.value
        assert first.error == "RankFailedError"
        assert "can't start new thread [rank 1 on " in first.text
        assert is_default
        assert second.digest == digest_of(checkpoint.content)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("cannot be shown")


def _fail_unspeakably(rank: int, url: str, model_dir: str) -> Outcome:
    def adapt(state_dict: dict[str, Any]) -> dict[str, Any]:
        if rank == 1:
            raise Unspeakable
        return state_dict

    return try_to_load(rank, url, model_dir, adapt=adapt)


def test_an_exception_that_cannot_be_shown_is_told_all_the_same(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    for outcome in outcomes(run_ranks(_fail_unspeakably, 3, args=(url, cache_dir))):
        assert outcome.error == "RankFailedError"
        assert "Unspeakable: (no text: ValueError in its __str__) [rank 1 on " in outcome.text


@pytest.mark.fault(52)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_an_error_text_of_megabytes_is_cut_and_the_store_survives_it(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    error = ValueError("beginning " + "x" * 12_000_000 + " end")
    results = run_ranks(_one_rank_fails, 3, env=launcher, args=(url, cache_dir, 1, error))
    for result in (results[0], results[2]):
        text = result.value[0].text
        assert "beginning" in text and "end" in text and "characters left out" in text
        assert len(text) < 10_000
    assert [result.value[1].digest for result in results] == [digest_of(checkpoint.content)] * 3


def _one_rank_is_interrupted(rank: int, url: str, model_dir: str) -> Outcome:
    if rank != 1:
        return try_to_load(rank, url, model_dir)
    try:
        load(rank, url, model_dir, map_location=_raise(KeyboardInterrupt()))
    except KeyboardInterrupt:
        return Outcome(0, 0, None, "KeyboardInterrupt")
    raise AssertionError("nothing was raised")


def test_ctrl_c_in_one_rank_cancels_the_call_on_the_others(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    ended = outcomes(run_ranks(_one_rank_is_interrupted, 3, args=(url, cache_dir)))
    assert [outcome.error for outcome in ended] == ["CallCancelledError", "KeyboardInterrupt", "CallCancelledError"]
    assert "KeyboardInterrupt [rank 1 on " in ended[0].text
