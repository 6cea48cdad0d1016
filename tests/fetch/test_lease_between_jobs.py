"""The lease between jobs: it saves a second download, and whatever happens to it, nothing breaks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import rankload
from harness.fetch_calls import fetch_and_mark, files_in, left_in
from harness.rank import mark, mark_and_wait
from harness.ranks import run_ranks, start_ranks, wait_until
from rankload._cache.lease import hold_lease
from rankload._settings import Settings
from rankload.errors import RankLostError

HALF = 4 << 20
NAME = "file.bin"


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch):
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", "2")


def lease_of(cache: Path) -> Path:
    return cache / ".rankload" / f"{NAME}.lease"


def start_job(url, cache, **rank_env):
    """One more job of a single rank."""
    return start_ranks(fetch_and_mark, 1, env="none", args=(url, cache), rank_env={0: rank_env})


def hold(rank, path):
    """Holds a lease as another program would, until it is told to let go."""
    with hold_lease(
        Path(path), Settings.from_environment(), progress_mark=lambda: None, on_wait=lambda: False
    ) as is_held:
        mark_and_wait("holds", is_held)


def fork_while_holding(rank, path):
    with hold_lease(
        Path(path), Settings.from_environment(), progress_mark=lambda: None, on_wait=lambda: False
    ) as is_held:
        assert is_held
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        child = os.fork()
        if child == 0:
            raise SystemExit  # leaves through the end of the block
        os.waitpid(child, 0)
        mark("children are gone", Path(path).exists())
    return Path(path).exists()


def test_ten_jobs_at_once_download_once(origin, cache, big_content, monkeypatch):
    # the 2 s of the other tests are soon over where ten processes share two cores
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", "30")
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 10, env="none", args=(url, cache)) as jobs:
        origin.wait_until_held(NAME)
        jobs.wait_for_mark("begins")
        origin.release(NAME)
        assert {result.value for result in jobs.wait()} == {big_content}
    assert (origin.request_count(), origin.bytes_sent()) == (1, len(big_content))
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


def test_waiter_goes_on_as_soon_as_the_file_is_there(origin, cache, big_content):
    """Not when the lease is released: the holder may be long in leaving."""
    url = origin.add(NAME, big_content)
    with start_ranks(hold, 1, env="none", args=(str(lease_of(cache)),)) as holder:
        lease_of(cache).parent.mkdir(parents=True)
        assert holder.wait_for_mark("holds") == [True]
        with start_job(url, cache) as job:
            wait_until(lambda: "DOWNLOAD" in job.stderr(0), 30, "the job has found nothing, and waits")
            cache.joinpath("other").write_bytes(big_content)
            cache.joinpath("other").rename(cache / NAME)
            assert job.wait(10)[0].value == big_content
        assert holder.is_alive(0)
        holder.open_gate("holds")
        holder.wait()
    assert origin.request_count() == 1 and origin.bytes_sent() <= 64 << 10  # asked whether it is its file


def test_lease_of_a_dead_process_is_taken_over_at_once(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", "600")
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_job(url, cache) as job:
        origin.wait_until_held(NAME)
        job.kill(0)
        job.wait_for_end(0)
    assert lease_of(cache).exists()
    origin.add(NAME, big_content)
    with start_job(url, cache) as job:
        [result] = job.wait(20)
    assert result.value == big_content and "without the lease" not in result.stderr
    assert left_in(cache) == []


def test_sigterm_leaves_no_lease(origin, cache, big_content):
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_job(url, cache) as job:
        origin.wait_until_held(NAME)
        assert lease_of(cache).exists()
        job.kill(0, signal.SIGTERM)
        assert job.wait_for_end(0, 5).exitcode == -signal.SIGTERM
    assert left_in(cache) == []


def test_sigterm_while_waiting_leaves_the_lease_of_the_holder(origin, cache, big_content):
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_job(url, cache) as holder, start_job(url, cache) as waiter:
        origin.wait_until_held(NAME)
        wait_until(lambda: all("DOWNLOAD" in job.stderr(0) for job in (holder, waiter)), 30, "both look")
        loser = next(job for job in (holder, waiter) if "Downloading" not in job.stderr(0))
        loser.kill(0, signal.SIGTERM)
        assert loser.wait_for_end(0, 5).exitcode == -signal.SIGTERM
        assert lease_of(cache).exists()
        origin.release(NAME)
        winner = waiter if loser is holder else holder
        assert winner.wait()[0].value == big_content
    assert origin.request_count() == 1 and left_in(cache) == []


@pytest.mark.fault(33)
def test_stopped_holder_is_taken_over_and_both_publish_the_same(origin, cache, big_content):
    """Its heartbeat stands still with it. When it goes on it has lost the lease, and harms nobody."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_job(url, cache) as stopped, start_job(url, cache) as other:
        origin.wait_until_held(NAME)
        wait_until(lambda: all("DOWNLOAD" in job.stderr(0) for job in (stopped, other)), 30, "both look")
        if "Downloading" in other.stderr(0):
            stopped, other = other, stopped
        stopped.stop(0)
        origin.wait_until_held(NAME, 2)  # the other one has taken over
        origin.release(NAME)
        assert other.wait(20)[0].value == big_content
        stopped.cont(0)
        assert stopped.wait(20)[0].value == big_content
    assert origin.request_count() == 2
    assert left_in(cache) == []


def test_holder_that_does_not_move_is_left_to_itself(origin, cache, big_content):
    """It is alive and keeps its lease, but nothing happens: after the deadlines others download for themselves."""
    lease_of(cache).parent.mkdir(parents=True)
    url = origin.add(NAME, big_content)
    with start_ranks(hold, 1, env="none", args=(str(lease_of(cache)),)) as holder:
        assert holder.wait_for_mark("holds") == [True]
        with start_job(url, cache, RANKLOAD_PROGRESS_SECONDS="0.5") as job:
            [result] = job.wait()
        assert result.value == big_content
        assert "makes no progress" in result.stderr and str(lease_of(cache)) in result.stderr
        assert holder.is_alive(0) and lease_of(cache).exists()
        holder.open_gate("holds")
        holder.wait()


@pytest.mark.fault(35)
def test_unequal_durations(origin, cache, big_content):
    lease_of(cache).parent.mkdir(parents=True)
    url = origin.add(NAME, big_content)
    with start_ranks(hold, 1, env="none", args=(str(lease_of(cache)),)) as holder:
        holder.wait_for_mark("holds")
        with start_job(url, cache, RANKLOAD_LEASE_SECONDS="3") as job:
            assert_went_on(job.wait()[0], big_content, "must agree on lease_duration")
        holder.open_gate("holds")
        holder.wait()


@pytest.mark.fault(27)
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_lease_of_another_user(origin, cache, big_content):
    lease_of(cache).parent.mkdir(parents=True)
    lease_of(cache).write_text("whatever")
    os.chown(lease_of(cache), 12345, -1)
    url = origin.add(NAME, big_content)
    with start_job(url, cache) as job:
        assert_went_on(job.wait()[0], big_content, "belongs to another user")
    assert lease_of(cache).exists()


def test_lease_path_is_a_directory(origin, cache, big_content):
    lease_of(cache).mkdir(parents=True)
    url = origin.add(NAME, big_content)
    with start_job(url, cache, RANKLOAD_PROGRESS_SECONDS="0.5") as job:
        assert_went_on(job.wait()[0], big_content, str(lease_of(cache)))


def test_lease_path_cannot_be_written(origin, cache, big_content):
    (cache / ".rankload" / f"{NAME}.lease").mkdir(parents=True)
    url = origin.add(NAME, big_content)
    with start_job(url, cache) as job:
        assert_went_on(job.wait()[0], big_content, "continuing without the lease")


def test_jobs_without_a_lease_publish_one_valid_file(origin, cache, big_content):
    """Correctness never depends on the lease: each has a partial file of its own."""
    (cache / ".rankload").mkdir(parents=True)
    (cache / ".rankload" / f"{NAME}.lease").symlink_to("nowhere")
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_ranks(fetch_and_mark, 4, env="none", args=(url, cache)) as jobs:
        origin.wait_until_held(NAME, 4)
        assert sum(name.endswith(".partial") for name in left_in(cache)) == 4
        origin.release(NAME)
        assert {result.value for result in jobs.wait()} == {big_content}
    assert files_in(cache) == [f".rankload/{NAME}.json", f".rankload/{NAME}.lease", NAME]


@pytest.mark.fault(53)
def test_forked_child_does_not_release(tmp_path):
    [result] = run_ranks(fork_while_holding, 1, env="none", args=(str(tmp_path / "x.lease"),))
    assert result.value is False  # released at the end, by the one who holds it
    assert result.marks == {"children are gone": True}


def test_failure_of_another_rank_ends_the_wait(tmp_path):
    """It may well be an OSError: it must not be taken for trouble with the lease."""
    path = tmp_path / "x.lease"

    def other_rank_failed():
        raise RankLostError("rank 3 is gone")

    with start_ranks(hold, 1, env="none", args=(str(path),)) as holder:
        holder.wait_for_mark("holds")
        with (
            pytest.raises(RankLostError),
            hold_lease(path, Settings.from_environment(), progress_mark=lambda: None, on_wait=other_rank_failed),
        ):
            raise AssertionError("never held")
        holder.open_gate("holds")
        holder.wait()


def assert_went_on(result, content, why):
    assert result.value == content
    assert "continuing without the lease" in result.stderr and why in result.stderr, result.stderr


def test_good_file_that_another_job_publishes_is_not_set_aside_for_the_damaged_one(origin, cache, big_content):
    """What a job has found damaged may be another file by the time that it has the lease."""
    url = origin.add(NAME, big_content)
    path = rankload.dist_fetch(url, cache)
    path.write_bytes(big_content[:-1])
    with start_ranks(hold, 1, env="none", args=(str(lease_of(cache)),)) as holder:
        assert holder.wait_for_mark("holds") == [True]
        with start_job(url, cache) as job:
            wait_until(lambda: "REPLACE" in job.stderr(0), 30, "the job has found the damage, and waits")
            (cache / "other").write_bytes(big_content)
            (cache / "other").rename(path)
            assert job.wait(10)[0].value == big_content
        holder.open_gate("holds")
        holder.wait()
    assert origin.request_count() == 1
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


def test_job_without_the_lease_leaves_anothers_file_alone(origin, cache):
    """Settings that differ are one way not to wait for the lease. What came first was returned, and is in use."""
    first, second = origin.add(f"x/{NAME}", b"first"), origin.add(f"y/{NAME}", b"other", hold_at=2)
    with start_job(second, cache, RANKLOAD_LEASE_SECONDS="30") as slow:
        origin.wait_until_held(f"y/{NAME}")
        with start_job(first, cache) as quick:
            assert [result.value for result in quick.wait()] == [b"first"]
        origin.release(f"y/{NAME}")
        assert [result.value for result in slow.wait()] == [b"other"]
    assert (cache / NAME).read_bytes() == b"first"


def be_killed_when_published(rank, url, cache):
    from rankload._fetch.partials.partial import Partial

    publish = Partial.publish

    def publish_and_die(partial, **arguments):
        publish(partial, **arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    Partial.publish = publish_and_die
    fetch_and_mark(rank, url, cache)


def test_what_a_leader_leaves_that_is_killed_after_publishing_is_removed_by_a_later_call(origin, cache, big_content):
    """Nobody asks for the lease any more, since the file is there."""
    url = origin.add(NAME, big_content)
    with start_ranks(be_killed_when_published, 1, env="none", args=(url, cache)) as job:
        job.wait_for_end(0)
    left = files_in(cache)
    assert lease_of(cache).exists() and len(left) > 2
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert lease_of(cache).exists()  # its holder might live, on another host
    for path in (cache / ".rankload").iterdir():
        os.utime(path, (0, 0))
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]
    assert origin.request_count() == 1
