"""Leases and locks of filesystems that lie, fail or hang, of other users and of other hosts."""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import time
from pathlib import Path

import pytest

import rankload
from harness import fuse, other_host
from harness.fetch_calls import fetch, files_in, left_in
from harness.rank import mark
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.users import ALICE, BOB, acting_as, public_directory
from rankload._cache import lease as lease_module
from rankload._settings import Settings

MIB = 1 << 20
HALF = 4 * MIB
NAME = "file.bin"
LEASE_SECONDS = 2.0
HOUR = 3600

needs_fuse = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users")
needs_namespaces = pytest.mark.skipif(other_host.why_not() is not None, reason=str(other_host.why_not()))


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch):
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", str(LEASE_SECONDS))
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")  # one held reply is one job's


def read_on_node(rank, url, paths):
    """Fetches over the mount of this rank's node; each node has as many ranks."""
    path = paths[rank * len(paths) // int(os.environ.get("WORLD_SIZE", "1"))]
    return Path(fetch(rank, url, path)).read_bytes()


def read_on_mount(rank, url, path):
    """One more job of a single rank, on that mount."""
    importlib.import_module(
        "rankload._fetch.miss"
    )  # first: what is measured is the wait for a lease, not an import on a busy machine

    return read_on_node(rank, url, [path])


def read_as(rank, uid, url, cache):
    with acting_as(uid):
        return Path(fetch(rank, url, cache)).read_bytes()


def read_with_clock(rank, url, cache, skews):
    """Fetches on a host whose clock is so many seconds ahead of the file server's."""
    skew, now, now_ns = skews[rank], time.time, time.time_ns
    time.time, time.time_ns = lambda: now() + skew, lambda: now_ns() + round(skew * 1e9)
    return Path(fetch(rank, url, cache)).read_bytes()


def read_where_locks_fail(rank, url, cache, code):
    """Python's lock calls fail with an errno that no FUSE filesystem may give; each is marked."""

    def fail(*arguments):
        mark("locked", arguments)
        raise OSError(code, "locks do not work here")

    fcntl.flock = fcntl.lockf = fail
    return Path(fetch(rank, url, cache)).read_bytes()


# --- another user's lease ------------------------------------------------------------------------------------------


@pytest.mark.fault(27)
@needs_root
def test_lease_that_another_user_holds(origin, big_content):
    """In a directory that all may write to, without a group: neither waits for the other, both have the file."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with public_directory(0o777) as cache:
        with start_ranks(read_as, 1, env="none", args=(ALICE, url, cache)) as alice:
            origin.wait_until_held(NAME)
            lease = cache / ".rankload" / f"{NAME}.lease"
            assert lease.stat().st_uid == ALICE and not lease.stat().st_mode & 0o022
            with start_ranks(read_as, 1, env="none", args=(BOB, url, cache)) as bob:
                origin.wait_until_held(NAME, 2)
                origin.release(NAME)
                [result] = bob.wait()
            assert result.value == big_content
            assert f"continuing without the lease {lease} (it belongs to another user)" in result.stderr
            assert alice.wait()[0].value == big_content
        assert (cache / NAME).read_bytes() == big_content and left_in(cache) == []


@pytest.mark.fault(27)
@needs_root
def test_lease_that_another_user_has_left(origin, big_content):
    """Its owner was killed: it may stay for ever, and nobody waits for it."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with public_directory(0o777) as cache:
        with start_ranks(read_as, 1, env="none", args=(ALICE, url, cache)) as alice:
            origin.wait_until_held(NAME)
            alice.kill(0)
            alice.wait_for_end(0)
        url = origin.add(NAME, big_content)
        [result] = run_ranks(read_as, 1, env="none", args=(BOB, url, cache))
        assert result.value == big_content and "it belongs to another user" in result.stderr
        assert (cache / NAME).read_bytes() == big_content


# --- locks of the filesystem -----------------------------------------------------------------------------------------


@pytest.mark.fault(29)
@needs_fuse
@pytest.mark.parametrize("locks", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EBADF"])
def test_lock_calls_that_fail(origin, tmp_path, big_content, locks):
    """No lock is asked for, so none is missed."""
    url = origin.add(NAME, big_content)
    with fuse.nodes(tmp_path, 2, locks=locks) as nodes:
        paths = [node.path for node in nodes]
        results = run_ranks(read_on_node, 2, nodes=2, args=(url, paths))
        assert {result.value for result in results} == {big_content}
        assert left_in(paths[0]) == []
    assert origin.bytes_sent() == len(big_content)


@pytest.mark.fault(29)
@pytest.mark.parametrize("code", [524, 38, 37])
def test_lock_calls_that_fail_with_an_errno_of_nfs(origin, cache, big_content, code):
    """524 is the kernel's own ENOTSUPP, which NFS lets through."""
    url = origin.add(NAME, big_content)
    [result] = run_ranks(read_where_locks_fail, 1, env="none", args=(url, cache, code))
    assert result.value == big_content and result.marks == {}
    assert origin.bytes_sent() == len(big_content)


@pytest.mark.fault(30)
@needs_fuse
def test_lock_calls_that_hang(origin, tmp_path, big_content):
    """Whoever made one would not come back: cold, waiting for another job, and warm."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with fuse.nodes(tmp_path, 2, locks="hang") as nodes:
        paths = [node.path for node in nodes]
        with start_ranks(read_on_node, 2, nodes=2, args=(url, paths)) as job:
            origin.wait_until_held(NAME)
            with start_ranks(read_on_mount, 1, env="none", args=(url, paths[1])) as other:
                wait_until(lambda: "DOWNLOAD" in other.stderr(0), 30, "the other job has found nothing, and waits")
                origin.release(NAME)
                assert other.wait()[0].value == big_content
            assert {result.value for result in job.wait()} == {big_content}
        warm = run_ranks(read_on_node, 2, nodes=2, args=(url, paths))
        assert {result.value for result in warm} == {big_content}
        assert left_in(paths[0]) == []


@pytest.mark.fault(31)
@needs_fuse
def test_two_mounts_on_which_everybody_gets_the_lease(origin, tmp_path, big_content):
    """Neither sees what the other has made: an exclusive open succeeds on both, and so does every lock."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with fuse.nodes(tmp_path, 2, locks="local", lag_seconds=15) as nodes:  # the second's record has to wait so long
        paths = [node.path for node in nodes]
        jobs = [start_ranks(read_on_mount, 1, env="none", args=(url, path)) for path in paths]
        with jobs[0], jobs[1]:
            origin.wait_until_held(NAME, 2)
            assert len(list((tmp_path / "server").glob("*.partial"))) == 2
            origin.release(NAME)
            assert [job.wait(60)[0].value for job in jobs] == [big_content] * 2
    assert (tmp_path / "server" / NAME).read_bytes() == big_content
    assert left_in(tmp_path / "server") == []


# --- holders on other hosts ------------------------------------------------------------------------------------------


@pytest.mark.fault(32)
@needs_namespaces
def test_holder_that_died_on_another_host(origin, cache, tmp_path, big_content):
    """Nobody can look for its process: its lease is taken when it was silent for long enough, and not earlier."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with other_host.start(other_host.FETCH, url, cache, directory=tmp_path) as holder:
        origin.wait_until_held(NAME)
        holder.kill()
    assert (cache / ".rankload" / f"{NAME}.lease").exists()
    url = origin.add(NAME, big_content)
    with start_ranks(read_on_mount, 1, env="none", args=(url, cache)) as job:
        wait_until(lambda: "DOWNLOAD" in job.stderr(0), 30, "it has found nothing")
        looked_at = time.monotonic()
        [result] = job.wait()
    waited = origin.requests()[-1].started_at - looked_at
    assert result.value == big_content and "without the lease" not in result.stderr
    assert LEASE_SECONDS - 0.5 < waited < LEASE_SECONDS + 2.0
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


def holder_here(url: str, path: Path, tmp_path: Path) -> None:
    """A job on this host that is killed while it downloads."""
    with start_ranks(read_on_mount, 1, env="none", args=(url, path)) as job:
        yield
        job.kill(0)
        job.wait_for_end(0)


def holder_elsewhere(url: str, path: Path, tmp_path: Path) -> None:
    """A job of another host, or of another container on this one: its process ids mean nothing here."""
    with other_host.start(other_host.FETCH, url, path, directory=tmp_path) as job:
        yield
        job.kill()


def holder_whose_pid_lives_on(url: str, path: Path, tmp_path: Path) -> None:
    """Its process id is another process' by now."""
    yield from holder_here(url, path, tmp_path)
    lease = path / ".rankload" / f"{NAME}.lease"
    text = lease.read_text()
    lease.write_text(re.sub(r"(?m)^pid=\d+$", f"pid={os.getpid()}", text))


@pytest.mark.fault(32)
@needs_fuse
@needs_namespaces
@pytest.mark.parametrize("holder", [holder_here, holder_elsewhere, holder_whose_pid_lives_on])
def test_holder_that_died_where_filelock_cannot_take_over(origin, tmp_path, big_content, holder):
    """FUSE refuses renameat2's flags here, as NFS, GPFS and BeeGFS do, and filelock 4.3 has no other means."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with fuse.mounted(tmp_path / "server", tmp_path / "mount") as mount:
        dying = holder(url, mount.path, tmp_path)
        next(dying)
        origin.wait_until_held(NAME)
        assert next(dying, None) is None
        assert (mount.path / ".rankload" / f"{NAME}.lease").exists()
        url = origin.add(NAME, big_content)
        with start_ranks(read_on_mount, 1, env="none", args=(url, mount.path)) as job:
            wait_until(lambda: "DOWNLOAD" in job.stderr(0), 30, "it has found nothing")
            looked_at = time.monotonic()
            [result] = job.wait()
        waited = origin.requests()[-1].started_at - looked_at
        assert result.value == big_content
        assert waited < LEASE_SECONDS + 5.0
        assert files_in(mount.path) == [f".rankload/{NAME}.json", NAME]


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(34)
@pytest.mark.parametrize("skew", [-HOUR, HOUR])
def test_lease_partial_and_journal_of_a_host_with_another_clock(origin, cache, big_content, skew):
    """A living holder is waited for, whatever the times of its files and of our clock are."""
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_ranks(read_with_clock, 1, env="none", args=(url, cache, [0])) as holder:
        origin.wait_until_held(NAME)
        lease = cache / ".rankload" / f"{NAME}.lease"
        with start_ranks(read_with_clock, 1, env="none", args=(url, cache, [-2 * skew])) as waiter:
            wait_until(lambda: "DOWNLOAD" in waiter.stderr(0), 30, "the waiter has found nothing")
            for _ in range(5):  # a heartbeat is a third of the lease: longer than the lease in all
                wait_until_refreshed(lease, move_times(skew, lease, *cache.glob("*.partial*")))
            assert origin.request_count() == 1
            origin.release(NAME)
            assert waiter.wait()[0].value == big_content
        assert holder.wait()[0].value == big_content
    assert origin.bytes_sent() == len(big_content)
    assert left_in(cache) == []


@pytest.mark.fault(34)
@needs_fuse
@pytest.mark.parametrize("skews", [(HOUR, -HOUR), (-HOUR, HOUR)])
def test_nodes_whose_clocks_differ(origin, tmp_path, big_content, skews):
    """Cold and warm, one download; the probe file of another job that has just begun is not taken for an old one."""
    url = origin.add(NAME, big_content)
    probe = tmp_path / "server" / ".rankload-probe-0123456789abcdef"
    probe.parent.mkdir()
    probe.touch()
    with fuse.nodes(tmp_path, 2) as nodes:
        paths = [node.path for node in nodes]
        for _ in range(2):
            results = run_ranks(read_with_clock_on_node, 2, nodes=2, args=(url, paths, skews))
            assert {result.value for result in results} == {big_content}
    assert origin.bytes_sent() == len(big_content)
    assert [name for name in left_in(tmp_path / "server") if name != probe.name] == []
    assert probe.exists()


@pytest.mark.fault(34)
def test_warm_call_on_a_host_with_another_clock_removes_no_living_holders_files(
    origin, cache, big_content, monkeypatch
):
    """Another host is renewing the file; by this one's clock, it was last heard of an hour ago."""
    url = origin.add(NAME, big_content)
    rankload.dist_fetch(url, cache)
    partial = f"{NAME}.ffffffff-7-7-deadbeef.partial"
    others = [cache / name for name in (f".rankload/{NAME}.lease", partial, f"{partial}.journal")]
    for path in others:
        path.write_bytes(b"{}\n")
    before = files_in(cache)
    real_time = time.time
    monkeypatch.setattr(time, "time", lambda: real_time() + HOUR)
    rankload.dist_fetch(url, cache)
    assert files_in(cache) == before
    move_times(-HOUR, *others)
    rankload.dist_fetch(url, cache)
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


def read_with_clock_on_node(rank, url, paths, skews):
    return read_with_clock(rank, url, paths[rank], skews)


def wait_until_refreshed(lease, mtime_ns):
    wait_until(lambda: lease.stat().st_mtime_ns != mtime_ns, 10, "the holder refreshes its lease")


def move_times(seconds, *paths):
    """Shifts the times of files; returns the first one's new time."""
    for path in paths:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))
    return paths[0].stat().st_mtime_ns


# --- many who wait ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(49)
def test_those_who_wait_look_at_intervals_of_their_own(tmp_path, monkeypatch):
    intervals = []
    monkeypatch.setattr(
        lease_module.SoftFileLease, "acquire", lambda self, *, poll_interval, **_: intervals.append(poll_interval)
    )
    for number in range(100):
        path = tmp_path / f"{number}.lease"
        with lease_module.hold_lease(path, Settings(), progress_mark=lambda: None, on_wait=lambda: False):
            pass
    assert len(set(intervals)) == 100 and 0.1 <= min(intervals) < 0.15 and 0.35 < max(intervals) <= 0.4


@pytest.mark.fault(49)
@pytest.mark.slow
def test_a_hundred_array_tasks_on_one_cold_cache(origin, cache, big_content):
    url = origin.add(NAME, big_content, hold_at=HALF)
    with start_ranks(digest_of_file, 100, env="none", args=(url, cache)) as jobs:
        origin.wait_until_held(NAME)
        wait_until(lambda: all("DOWNLOAD" in jobs.stderr(rank) for rank in range(100)), 120, "all look")
        origin.release(NAME)
        results = jobs.wait(120)
    assert len({result.value for result in results}) == 1
    assert (cache / NAME).read_bytes() == big_content
    assert origin.bytes_sent() == len(big_content)
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


def digest_of_file(rank, url, cache):
    import hashlib

    return hashlib.sha256(Path(fetch(rank, url, cache)).read_bytes()).hexdigest()
