"""Signals during a call: it ends at once, cleanly, and by the signal; handlers of the user's own are left alone."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rank_functions import leftovers, load, outcomes, try_and_tell

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin, Reply
from harness.rank import mark, wait_for_gate
from harness.ranks import run_ranks, start_ranks, wait_until
from rankload._coordination.thread_signals import call_on_sigterm, stop_waiting

#: What is promised is half a second; machines that run other tests meanwhile get as much again.
_SECONDS = 1.0


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
@pytest.mark.parametrize("rank", [0, 2], ids=["downloading leader", "waiting rank"])
def test_sigterm_ends_the_process_at_once_and_cancels_the_call_everywhere(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str, rank: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(try_and_tell, 3, env=launcher, args=(url, cache_dir)) as group:
        group.wait_for_mark("waiting", [1, 2])
        wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 30, "a partial file")
        signalled_at = time.monotonic()
        group.kill(rank, signal.SIGTERM)
        ended = group.wait_for_end(rank)
        print(f"ended {ended.ended_at - signalled_at:.3f} s after SIGTERM")
        others = outcomes([group.wait_for_end(other) for other in range(3) if other != rank])
    assert ended.exitcode == -signal.SIGTERM, ended.describe()
    assert ended.ended_at - signalled_at < _SECONDS
    assert [outcome.error for outcome in others] == ["CallCancelledError"] * 2
    assert all(f"SIGTERM [rank {rank} on " in outcome.text for outcome in others)
    assert leftovers(cache_dir) == []


def test_sigterm_to_all_ranks_at_once_as_schedulers_send_it(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(try_and_tell, 4, env="env", args=(url, cache_dir)) as group:
        group.wait_for_mark("waiting", [1, 2, 3])
        wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 30, "a partial file")
        signalled_at = time.monotonic()
        for rank in range(4):
            group.kill(rank, signal.SIGTERM)
        results = group.wait()
    assert [result.exitcode for result in results] == [-signal.SIGTERM] * 4
    assert max(result.ended_at for result in results) - signalled_at < _SECONDS + 0.5
    assert leftovers(cache_dir) == []


def _wait_for_rank_0(rank: int, url: str, model_dir: str) -> str:
    mark("ready")
    return load(rank, url, model_dir)


@pytest.mark.fault(38)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_sigterm_to_a_rank_that_waits_for_rank_0_to_come(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str, short_deadlines: float
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_wait_for_rank_0, 2, env=launcher, args=(url, cache_dir), held=[0]) as group:
        wait_until(lambda: "rank 0 has not made the call" in group.stderr(1), 30, "rank 1 waits")
        signalled_at = time.monotonic()
        group.kill(1, signal.SIGTERM)
        ended = group.wait_for_end(1)
    assert ended.exitcode == -signal.SIGTERM
    assert ended.ended_at - signalled_at < _SECONDS


def _with_own_handlers(rank: int, url: str, model_dir: str) -> tuple[str, bool]:
    def handle(signum: int, frame: Any) -> None:
        mark(f"handled-{signum}", time.monotonic())

    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, handle)
    mark("ready")
    digest = load(rank, url, model_dir)
    return digest, signal.getsignal(signal.SIGTERM) is handle


@pytest.mark.fault(38)
def test_handlers_of_the_users_own_run_at_once_and_the_call_goes_on(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(_with_own_handlers, 3, args=(url, cache_dir)) as group:
        group.wait_for_mark("ready")
        wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 30, "a partial file")
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            for rank in range(3):
                signalled_at = time.monotonic()
                group.kill(rank, signum)
                [handled_at] = group.wait_for_mark(f"handled-{int(signum)}", [rank])
                assert handled_at - signalled_at < _SECONDS
        origin.release(checkpoint.name)
        results = group.wait()
    assert [result.value for result in results] == [(digest_of(checkpoint.content), True)] * 3


def _then_the_default_again(rank: int, url: str, model_dir: str) -> Any:
    load(rank, url, model_dir)
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_after_the_call_sigterm_is_at_its_default_again(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_then_the_default_again, 2, args=(url, cache_dir)) as group:
        assert [result.value for result in group.wait()] == [True, True]


def _load_on_a_thread(rank: int, url: str, model_dir: str) -> None:
    thread = threading.Thread(target=load, args=(rank, url, model_dir))
    thread.start()
    thread.join()


@pytest.mark.fault(38)
@pytest.mark.parametrize("world_size", [1, 2])
def test_sigterm_to_a_leader_that_makes_the_call_on_another_thread(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, world_size: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(bytes_per_second=500))
    launcher = "none" if world_size == 1 else "torchrun"
    with start_ranks(_load_on_a_thread, world_size, env=launcher, args=(url, cache_dir)) as group:
        wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 30, "a partial file")
        signalled_at = time.monotonic()
        group.kill(0, signal.SIGTERM)
        ended = group.wait_for_end(0)
    assert ended.exitcode == -signal.SIGTERM, ended.describe()
    assert ended.ended_at - signalled_at < _SECONDS + 1
    assert leftovers(cache_dir) == []


def _who_blocks_sigterm(rank: int) -> dict[str, bool]:
    """Each has to leave it to the main thread: one that is being started would take the signal and lose it."""
    blocks: dict[str, bool] = {}

    def note(who: str) -> None:
        blocks[who] = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def call() -> None:
        assert call_on_sigterm(1, lambda: None)
        assert call_on_sigterm(2, lambda: None)  # a call within the call
        note("the call's thread")
        started = threading.Thread(target=note, args=("a thread of the call",))
        started.start()
        started.join()
        child = os.fork()
        if child == 0:
            os._exit(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        blocks["a child"] = bool(os.waitpid(child, 0)[1])
        stop_waiting(2)
        stop_waiting(1)
        note("the thread after the call")

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    note("the main thread")
    return blocks


def test_what_a_call_on_another_thread_starts_leaves_sigterm_to_the_main_thread() -> None:
    [result] = run_ranks(_who_blocks_sigterm, 1, env="none")
    assert result.value == {
        "the call's thread": True,
        "a thread of the call": True,
        "a child": False,
        "the thread after the call": False,
        "the main thread": False,
    }


def _fork_while_loading_on_a_thread(rank: int, url: str, model_dir: str) -> str:
    loaded: list[str] = []
    thread = threading.Thread(target=lambda: loaded.append(load(rank, url, model_dir)))
    thread.start()
    mark("began")
    wait_for_gate("fork")
    child = os.fork()
    if child == 0:
        signal.pause()
    os.kill(child, signal.SIGTERM)  # as a DataLoader does with its workers
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    mark("child is dead")
    thread.join()
    return loaded[0]


def test_sigterm_to_a_child_is_none_to_the_process_that_makes_the_call(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(_fork_while_loading_on_a_thread, 1, env="none", args=(url, cache_dir)) as group:
        wait_until(lambda: list(Path(cache_dir).glob("*.partial")), 30, "a partial file")
        group.open_gate("fork")
        group.wait_for_mark("child is dead")
        origin.release(checkpoint.name)
        [result] = group.wait()
    assert result.value == digest_of(checkpoint.content)


def _keep_c_handler(rank: int, url: str, model_dir: str) -> str:
    faulthandler.register(signal.SIGTERM, file=sys.stderr, chain=False)  # as an MPI library: Python knows nothing of it
    digest = load(rank, url, model_dir)
    os.kill(os.getpid(), signal.SIGTERM)
    return digest


def test_handler_of_a_library_is_left_alone(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_keep_c_handler, 1, env="none", args=(url, cache_dir)) as group:
        [result] = group.wait()
    assert result.value == digest_of(checkpoint.content)


def _load_on_a_thread_without_more_threads(rank: int, url: str, model_dir: str) -> str:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "rankload-sigterm":
            raise RuntimeError("can't start new thread")
        start(thread)

    threading.Thread.start = refuse  # type: ignore[method-assign]
    loaded: list[str] = []
    thread = threading.Thread(target=lambda: loaded.append(load(rank, url, model_dir)))
    thread.start()
    thread.join()
    return loaded[0]


def test_call_goes_on_where_no_thread_can_wait_for_sigterm(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_load_on_a_thread_without_more_threads, 2, args=(url, cache_dir)) as group:
        assert [result.value for result in group.wait()] == [digest_of(checkpoint.content)] * 2
