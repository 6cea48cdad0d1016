"""Caches, quotas, stale files and refusals of the harness's mounts.

A cache is shown by a lower bound on how long it lasts, from before it was filled: that holds on a slow machine, too.
"""

import contextlib
import fcntl
import mmap
import os
import time

import pytest
from fuse_calls import errno_of, node_paths, opened

from harness import fuse
from harness.waiting import wait_until

pytestmark = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))

CACHE_SECONDS = 0.4
JIFFY_SECONDS = 0.02  # the kernel counts in ticks


@contextlib.contextmanager
def outlasting_the_cache(predicate):
    """Runs the block, waits until the predicate is true, and asserts that the cache's time has passed by then."""
    started = time.monotonic()
    yield
    wait_until(predicate, 10, "the cache is not asked any more")
    assert time.monotonic() - started >= CACHE_SECONDS - JIFFY_SECONDS


# --- caches -------------------------------------------------------------------------------------------------------


def test_an_absent_name_stays_absent(tmp_path):
    with node_paths(tmp_path, 2, negative_seconds=CACHE_SECONDS) as (a, b):
        with outlasting_the_cache((b / "new").exists):
            assert not (b / "new").exists()
            (a / "new").touch()
            assert os.listdir(b) == ["new"]
        assert not (b / "other").exists()
        (a / "other").touch()
        assert errno_of(os.open, b / "other", os.O_CREAT | os.O_EXCL) == "EEXIST"


@pytest.mark.parametrize("is_open", [False, True])
def test_a_size_stays_as_it_was(tmp_path, is_open):
    caches = {"attribute_seconds": CACHE_SECONDS, "entry_seconds": 0 if is_open else CACHE_SECONDS}
    with node_paths(tmp_path, 2, **caches) as (a, b), contextlib.ExitStack() as stack:
        (a / "file").write_bytes(b"1234")
        which = opened(stack, b / "file", os.O_RDONLY) if is_open else b / "file"
        with outlasting_the_cache(lambda: os.stat(which).st_size == 9):
            assert os.stat(which).st_size == 4
            with open(a / "file", "ab") as file:
                file.write(b"56789")
            assert (a / "file").stat().st_size == 9
        assert (b / "file").read_bytes() == b"123456789"


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_removed_or_replaced_name_stays(tmp_path, is_replaced):
    with node_paths(tmp_path, 2, entry_seconds=CACHE_SECONDS) as (a, b):
        (a / "file").write_bytes(b"old")
        (a / "new").write_bytes(b"new")
        seen = (b / "file").read_bytes

        def is_news():
            return seen() == b"new" if is_replaced else not (b / "file").exists()

        with outlasting_the_cache(is_news):
            assert seen() == b"old"
            os.replace(a / "new", a / "file") if is_replaced else os.unlink(a / "file")
            assert (a / "file").exists() == is_replaced


def test_a_new_name_lags(tmp_path):
    with node_paths(tmp_path, 2, lag_seconds=CACHE_SECONDS) as (a, b):
        with outlasting_the_cache((b / "file").exists):
            (a / "partial").write_bytes(b"text")
            os.rename(a / "partial", a / "file")
            assert os.listdir(a) == ["file"] and (a / "file").exists()
        assert os.listdir(b) == ["file"]
        (a / "file").write_bytes(b"other")  # known for good
        assert (b / "file").read_bytes() == b"other"


def test_a_name_that_lags_can_be_opened_for_creation(tmp_path):
    with node_paths(tmp_path, 2, lag_seconds=60) as (a, b):
        for name in "first", "second":
            (a / name).write_bytes(b"text")
        assert os.listdir(b) == [] and not (b / "first").exists()
        assert errno_of(os.open, b / "first", os.O_CREAT | os.O_EXCL) == "EEXIST"
        assert not (b / "first").exists()
        with open(b / "second", "a+") as file:
            file.seek(0)
            assert file.read() == "text"
        assert os.listdir(b) == ["second"]


# --- quotas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quota_errno", ["EDQUOT", "ENOSPC"])
def test_a_write_beyond_the_quota(tmp_path, quota_errno):
    with node_paths(tmp_path, quota_bytes=10000, quota_errno=quota_errno) as [a], contextlib.ExitStack() as stack:
        (a / "other").write_bytes(bytes(4000))
        descriptor = opened(stack, a / "file")
        assert os.write(descriptor, bytes(5000)) == 5000
        assert os.write(descriptor, bytes(5000)) == 1000
        assert errno_of(os.write, descriptor, b"1") == quota_errno
        assert errno_of(os.posix_fallocate, descriptor, 0, 10000) == quota_errno
        assert os.pwrite(descriptor, b"within", 0) == 6
        os.fsync(descriptor)
        free = os.statvfs(a).f_bavail * os.statvfs(a).f_frsize
        assert free == 0 if quota_errno == "ENOSPC" else free > 10000
        os.unlink(a / "other")
        assert os.write(descriptor, bytes(5000)) == 4000


@pytest.mark.parametrize("call", [os.fsync, os.fdatasync, os.close])
def test_a_quota_that_only_the_server_knows(tmp_path, call):
    with node_paths(tmp_path, quota_bytes=10000, quota_at="close") as [a]:
        descriptor = os.open(a / "file", os.O_CREAT | os.O_WRONLY)
        assert os.write(descriptor, bytes(15000)) == 15000
        assert errno_of(call, descriptor) == "EDQUOT"
        if call is not os.close:
            assert errno_of(os.close, descriptor) == ""  # told once
        assert (a / "file").stat().st_size == 10000


# --- stale files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove", ["unlink", "replace"])
def test_a_file_removed_elsewhere_is_stale(tmp_path, remove):
    with node_paths(tmp_path, 2, stale_when_removed=True) as (a, b), contextlib.ExitStack() as stack:
        (a / "file").write_bytes(b"old")
        here, there = (opened(stack, path / "file", os.O_RDWR) for path in (a, b))
        if remove == "unlink":
            os.unlink(a / "file")
            assert not (b / "file").exists()
        else:
            (a / "new").write_bytes(b"new")
            os.replace(a / "new", a / "file")
            assert (b / "file").read_bytes() == b"new"
        assert os.pread(here, 3, 0) == b"old" and os.fstat(here).st_nlink == 0
        calls = [(os.pread, 3, 0), (os.pwrite, b"x", 0), (os.ftruncate, 1), (os.fsync,), (os.fstat,), (fcntl.flock, 2)]
        assert {errno_of(call, there, *args) for call, *args in calls} == {"ESTALE"}


def test_a_cached_name_of_a_removed_file_is_looked_up_again(tmp_path):
    """As on NFS: the kernel itself tries again after ESTALE."""
    with node_paths(tmp_path, 2, stale_when_removed=True, entry_seconds=60, attribute_seconds=60) as (a, b):
        (a / "file").write_bytes(b"old")
        inode = (b / "file").stat().st_ino
        (a / "new").write_bytes(b"newer")
        os.replace(a / "new", a / "file")
        assert (b / "file").stat().st_ino == inode
        assert (b / "file").read_bytes() == b"newer"


def test_the_first_opens_and_reads_are_stale(tmp_path):
    with node_paths(tmp_path, stale_opens=2, stale_reads=2) as [a], contextlib.ExitStack() as stack:
        (tmp_path / "server" / "file").write_bytes(b"content")
        assert [errno_of(os.open, a / "file", os.O_RDONLY) for _ in range(2)] == ["ESTALE"] * 2
        descriptor = opened(stack, a / "file", os.O_RDONLY)
        assert [errno_of(os.pread, descriptor, 3, 0) for _ in range(3)] == ["ESTALE", "ESTALE", ""]
        assert (a / "file").read_bytes() == b"content"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_no_links_and_no_fallocate(tmp_path):
    with node_paths(tmp_path, has_links=False, supports_fallocate=False) as [a], open(a / "file", "wb") as file:
        assert errno_of(os.link, a / "file", a / "other") == "EPERM"
        # glibc's posix_fallocate writes zeros instead, so the call is made as the kernel has it.
        assert errno_of(fallocate, file.fileno(), 4096) == "ENOTSUP"
        assert os.fstat(file.fileno()).st_size == 0


def fallocate(descriptor, size_bytes):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size_bytes)) == -1:
        raise OSError(ctypes.get_errno(), "fallocate")


def test_no_page_cache(tmp_path):
    with node_paths(tmp_path, direct_io=True) as [a], contextlib.ExitStack() as stack:
        (a / "file").write_bytes(bytes(8192))
        descriptor = opened(stack, a / "file")
        assert errno_of(mmap.mmap, descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ) == "ENODEV"
        with mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE) as mapped:
            assert mapped[:] == bytes(8192)
        os.pwrite(descriptor, b"x", 0)
        assert os.pread(descriptor, 2, 0) == b"x\0"


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("fsync", lambda a, file: os.fsync(file)),
        ("fsync", lambda a, file: os.fdatasync(file)),
        ("write", lambda a, file: os.write(file, b"x")),
        ("flush", lambda a, file: os.close(os.dup(file))),
        ("rename", lambda a, file: os.rename(a / "file", a / "other")),
        ("unlink", lambda a, file: os.unlink(a / "file")),
        ("mkdir", lambda a, file: os.mkdir(a / "folder")),
        ("statfs", lambda a, file: os.statvfs(a)),
        ("fsyncdir", lambda a, file: sync_directory(a)),
    ],
)
def test_an_operation_that_always_fails(tmp_path, operation, call):
    with node_paths(tmp_path, errors={operation: "EIO"}) as [a]:
        file = os.open(a / "file", os.O_CREAT | os.O_RDWR)
        assert errno_of(call, a, file) == "EIO"
        with contextlib.suppress(OSError):
            os.close(file)


def sync_directory(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
