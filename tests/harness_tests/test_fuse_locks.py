"""Locks on the harness's mounts: coherent, each mount's own, or refused."""

import contextlib
import fcntl
import os
import signal
import time

import pytest
from fuse_calls import errno_of, node_paths, opened

from harness import fuse
from harness.rank import mark
from harness.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))


def lock_errors(first, second, third):
    """Takes both kinds of lock on ``first``; how ``second`` (own mount) and ``third`` (other mount) fare."""
    found = {}
    for name, take in {"flock": fcntl.flock, "fcntl": fcntl.lockf}.items():
        fails = errno_of(take, first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # An fcntl lock does not exclude its own process.
        found[name] = [fails] + [
            errno_of(take, other, fcntl.LOCK_EX | fcntl.LOCK_NB) for other in (second, third)[name == "fcntl" :]
        ]
    return found


LOCKS = {
    "pass": {"flock": ["", "EAGAIN", "EAGAIN"], "fcntl": ["", "EAGAIN"]},
    "local": {"flock": ["", "EAGAIN", ""], "fcntl": ["", ""]},
    **{name: {"flock": [name] * 3, "fcntl": [name] * 2} for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EIO")},
}


@pytest.mark.parametrize("locks", LOCKS)
def test_locks(tmp_path, locks):
    with node_paths(tmp_path, 2, locks=locks) as (a, b), contextlib.ExitStack() as stack:
        first, second, third = (opened(stack, path / "lock") for path in (a, a, b))
        assert lock_errors(first, second, third) == LOCKS[locks]
        for descriptor in (first, second, third):
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                fcntl.lockf(descriptor, fcntl.LOCK_UN)
        if locks == "pass":
            assert lock_errors(third, first, second)["flock"] == ["", "EAGAIN", "EAGAIN"]


def take_lock(rank, path, kind):
    with open(path, "r+") as file:
        mark("asks")
        (fcntl.flock if kind == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX)
        return time.monotonic()


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_a_blocked_lock_comes_when_it_is_free_and_can_be_killed(tmp_path, kind):
    take = fcntl.flock if kind == "flock" else fcntl.lockf
    with node_paths(tmp_path, 2) as (a, b), open(a / "lock", "w") as file:
        take(file, fcntl.LOCK_EX)
        with start_ranks(take_lock, 2, env="none", args=(b / "lock", kind)) as ranks:
            ranks.wait_for_mark("asks")
            ranks.kill(0)
            assert ranks.wait_for_end(0, 5).exitcode == -signal.SIGKILL
            assert ranks.is_alive(1)
            freed_at = time.monotonic()
            take(file, fcntl.LOCK_UN)
            assert ranks.wait_for_end(1).value >= freed_at


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_a_lock_call_that_hangs_can_be_killed(tmp_path, kind):
    with node_paths(tmp_path, locks="hang") as [path]:
        (path / "lock").touch()
        with start_ranks(take_lock, 1, env="none", args=(path / "lock", kind)) as ranks:
            ranks.wait_for_mark("asks")
            assert (path / "lock").exists() and ranks.is_alive(0)  # the mount itself answers
            ranks.kill(0)
            assert ranks.wait_for_end(0, 5).exitcode == -signal.SIGKILL


def test_an_fcntl_lock_goes_with_any_close_of_its_process(tmp_path):
    with node_paths(tmp_path, 2) as (a, b), contextlib.ExitStack() as stack:
        first, third = opened(stack, a / "lock"), opened(stack, b / "lock")
        fcntl.lockf(first, fcntl.LOCK_EX)
        [result] = run_ranks(try_record_lock, 1, env="none", args=(a / "lock",))
        assert result.value == "EAGAIN"
        os.close(os.open(a / "lock", os.O_RDONLY))
        fcntl.lockf(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_record_lock(rank, path):
    with open(path, "r+") as file:
        return errno_of(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
