"""Disks that are full or limited: real filesystems that the test and its ranks alone see."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import rankload
from harness import disks, fuse
from harness.fetch_calls import error_in, errors_of, expect, fetch, fetch_and_mark, files_in
from harness.ranks import run_ranks, start_ranks, wait_until

MIB = 1 << 20
NAME = "file.bin"


def needs(*programs: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(disks.why_not(*programs) is not None, reason=str(disks.why_not(*programs)))


needs_mounts = needs()
needs_fuse = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))


@pytest.fixture
def small_steps(monkeypatch):
    """Several ranges a download, and a keeper that looks at the disk at once."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", "0.9")


# --- no room -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(22)
@needs_mounts
def test_full_disk_is_seen_before_the_first_byte_is_written(origin, tmp_path, big_content):
    url = origin.add(NAME, big_content, hold_at=1)
    with disks.tmpfs(tmp_path / "cache", size_bytes=MIB) as cache:
        errors = errors_of(fetch, url, cache)
        texts = ("No space left on device", "8.39 MB needed, 1.0", f"free in {cache}", "make room", "model_dir=")
        assert_no_room(errors, cache, errno.ENOSPC, *texts)
        assert {error.needed_bytes for error in errors} == {len(big_content)}
        assert all(MIB * 0.9 < error.free_bytes <= MIB for error in errors)
        assert files_in(cache) == []
    origin.release(NAME)
    assert origin.request_count() == 1


@pytest.mark.fault(22)
@needs("mkfs.ext4", "mount")
@pytest.mark.parametrize("filesystem", ["tmpfs", "ext4"])
def test_full_disk_is_seen_at_the_write_where_the_length_is_not_known(origin, tmp_path, big_content, filesystem):
    url = origin.add(NAME, big_content, content_length=False, ranges="ignored")
    make = {"tmpfs": disks.tmpfs, "ext4": disks.ext4_image}[filesystem]
    with make(tmp_path / "cache", size_bytes=4 * MIB) as cache:
        errors = errors_of(fetch, url, cache)
        assert_no_room(errors, cache, errno.ENOSPC, "No space left on device", f"free in {cache}", "make room")
        assert {error.needed_bytes for error in errors} == {None}
        assert [name for name in files_in(cache) if name != "lost+found"] == []


@pytest.mark.fault(22)
@needs_mounts
def test_room_for_the_whole_file_is_taken_before_it_comes(origin, tmp_path, big_content):
    """Whoever fills the disk meanwhile gets the error, not the download that was there first."""
    url = origin.add(NAME, big_content, hold_at=MIB)
    with (
        disks.tmpfs(tmp_path / "cache", size_bytes=10 * MIB) as cache,
        start_ranks(fetch_and_mark, 1, env="none", args=(url, cache)) as group,
    ):
        origin.wait_until_held(NAME)
        [partial] = cache.glob("*.partial")
        wait_until(lambda: partial.stat().st_blocks * 512 >= len(big_content), 10, "room is taken")
        with pytest.raises(OSError, match="No space left"):
            fill(cache / "other")
        origin.release(NAME)
        assert group.wait()[0].value == big_content


@pytest.mark.fault(22)
@needs_fuse
def test_disk_that_fills_up_in_the_middle_where_no_room_can_be_taken(origin, tmp_path, big_content, small_steps):
    """As on NFS before 4.2: there is no fallocate, and another program takes the space that was there."""
    url = origin.add(NAME, big_content, hold_at=MIB // 2)
    vices = {"supports_fallocate": False, "quota_bytes": 10 * MIB, "quota_errno": "ENOSPC"}
    with fuse.mounted(tmp_path / "server", tmp_path / "node", **vices) as node:
        with start_ranks(fetch, 2, args=(url, node.path)) as group:
            origin.wait_until_held(NAME)
            (tmp_path / "server" / "other").write_bytes(bytes(6 * MIB))
            origin.release(NAME)
            errors = [error_in(result) for result in group.wait()]
        assert_no_room(errors, node.path, errno.ENOSPC, "8.39 MB needed", f"free in {node.path}")
        assert files_in(node.path) == ["other"]


@pytest.mark.fault(22)
@needs_mounts
def test_there_is_room_again_for_the_next_call(origin, tmp_path, big_content):
    url = origin.add(NAME, big_content)
    with disks.tmpfs(tmp_path / "cache", size_bytes=10 * MIB) as cache:
        (cache / "other").write_bytes(bytes(4 * MIB))
        [error, _] = errors_of(fetch, url, cache)
        assert error.errno == errno.ENOSPC
        (cache / "other").unlink()
        [result] = run_ranks(fetch_and_mark, 1, env="none", args=(url, cache))
        assert result.value == big_content


# --- no quota ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(23)
@needs("mkfs.btrfs", "btrfs", "mount")
@pytest.mark.parametrize("has_length", [True, False])
def test_quota_is_used_up_at_a_write(origin, tmp_path, big_content, has_length):
    """A real quota, which statfs does not show: no look at the free space foretells it."""
    url = origin.add(NAME, big_content, content_length=has_length, ranges="honest" if has_length else "ignored")
    with disks.btrfs_with_quota(tmp_path / "disk", quota_bytes=4 * MIB) as cache:
        errors = errors_of(fetch, url, cache)
        assert_no_room(errors, cache, errno.EDQUOT, "Disk quota exceeded", f"free in {cache}", "make room")
        assert ("8.39 MB needed" in str(errors[0])) == has_length
        assert files_in(cache) == []


@pytest.mark.fault(23)
@needs_fuse
@pytest.mark.parametrize("quota_errno", ["EDQUOT", "ENOSPC"])
def test_quota_is_used_up_at_fsync_or_close(origin, tmp_path, big_content, quota_errno, small_steps):
    """As on NFS, whose server hears of the bytes only then: every write has succeeded."""
    url = origin.add(NAME, big_content)
    vices = {"supports_fallocate": False, "quota_at": "close", "quota_errno": quota_errno, "quota_bytes": 4 * MIB}
    vices |= {"errors": {"statfs": "ENOSYS"}} if quota_errno == "ENOSPC" else {}  # or it is foreseen
    with fuse.mounted(tmp_path / "server", tmp_path / "node", **vices) as node:
        errors = errors_of(fetch, url, node.path)
        assert_no_room(errors, node.path, getattr(errno, quota_errno), "8.39 MB needed")
        assert files_in(node.path) == []


@pytest.mark.fault(23)
@needs_fuse
def test_loss_that_the_kernel_told_the_keeper_is_not_forgotten(origin, tmp_path, big_content, small_steps):
    """It is told once to all who share the open file. When there is room again, the last fsync knows nothing of it."""
    url = origin.add(NAME, big_content, hold_at=MIB // 2)
    vices = {"supports_fallocate": False, "quota_at": "close", "quota_bytes": 10 * MIB}
    with fuse.mounted(tmp_path / "server", tmp_path / "node", **vices) as node:
        other = tmp_path / "server" / "other"
        with start_ranks(fetch, 1, env="none", args=(url, node.path), rank_env={0: {"RANKLOAD_STREAMS": "1"}}) as group:
            origin.wait_until_held(NAME)
            [partial] = (tmp_path / "server").glob("*.partial")
            wait_until(lambda: partial.stat().st_size == MIB // 2, 10, "it is written")
            other.write_bytes(bytes(10 * MIB - 1000))
            wait_until(lambda: partial.stat().st_size < 1000, 10, "what was too much is gone")
            other.unlink()
            origin.release(NAME)
            [result] = group.wait()
        assert isinstance(error_in(result), rankload.CacheError)
        assert error_in(result).errno == errno.EDQUOT
        assert files_in(node.path) == []


# --- no inodes -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(24)
@needs_mounts
@pytest.mark.parametrize("inodes", [1, 2, 3])
def test_no_inode_for_the_partial_file(origin, tmp_path, big_content, inodes):
    """The root has one; a directory and the lease may get two."""
    url = origin.add(NAME, big_content, hold_at=1)
    with disks.tmpfs(tmp_path / "cache", size_bytes=32 * MIB, inodes=inodes) as cache:
        errors = errors_of(fetch, url, cache)
        texts = ("no inode is left for another file", f"though {33.55:.2f} MB are free", "remove files", "model_dir=")
        assert_no_room(errors, cache, errno.ENOSPC, *texts)
        assert files_in(cache) == []
    assert origin.request_count() == 0


@pytest.mark.fault(24)
@needs("mkfs.ext4", "mount")
def test_no_inode_on_ext4(origin, tmp_path):
    url = origin.add(NAME, b"content")
    with disks.ext4_image(tmp_path / "cache", size_bytes=4 * MIB) as cache:
        with pytest.raises(OSError, match="No space left"):
            for number in range(100):
                (cache / f"{number}").touch()
        assert_no_room(errors_of(fetch, url, cache), cache, errno.ENOSPC, "no inode is left for another file")


@pytest.mark.fault(24)
@needs_mounts
def test_no_inode_for_the_cache_directory(origin, tmp_path):
    url = origin.add(NAME, b"content")
    with disks.tmpfs(tmp_path / "disk", size_bytes=MIB, inodes=1) as disk:
        errors = errors_of(fetch, url, disk / "cache")
        expect(errors, rankload.CacheError, f"cannot make the cache directory {disk / 'cache'}", "no inode is left")
        assert {error.errno for error in errors} == {errno.ENOSPC}


@pytest.mark.fault(24)
@needs_mounts
@pytest.mark.parametrize("inodes", [4, 5])
def test_inodes_for_the_file_and_its_record_are_enough(origin, tmp_path, big_content, inodes):
    """A journal is a help. A record is a need: without one, another URL of that name would get the file."""
    url = origin.add(NAME, big_content)
    with disks.tmpfs(tmp_path / "cache", size_bytes=32 * MIB, inodes=inodes) as cache:
        if inodes == 4:
            errors = errors_of(fetch, url, cache)
            expect(errors, rankload.CacheError, f"{NAME}.json", "no inode is left")
            assert files_in(cache) in ([], [".rankload"])
            return
        [result] = run_ranks(fetch_and_mark, 1, env="none", args=(url, cache))
        assert result.value == big_content
        assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


def assert_no_room(errors: list[BaseException], cache: Path, code: int, *texts: str) -> None:
    """The same error on every rank: which path, and how much there is."""
    expect(errors, rankload.CacheError, f"cannot write {cache}/{NAME}", *texts)
    for error in errors:
        assert isinstance(error, OSError) and error.errno == code
        assert Path(error.path).parent == cache
        assert isinstance(error.free_bytes, int) and error.rank == 0


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


@pytest.mark.fault(24)
@needs_mounts
def test_no_inode_for_the_journal_of_a_download_that_takes_long(origin, tmp_path, big_content, small_steps):
    """Its keeper has nothing to write to, and says nothing."""
    url = origin.add(NAME, big_content, hold_at=MIB // 2)
    with disks.tmpfs(tmp_path / "cache", size_bytes=32 * MIB, inodes=5) as cache:
        (cache / "other").touch()
        with start_ranks(fetch_and_mark, 1, env="none", args=(url, cache)) as group:
            origin.wait_until_held(NAME)
            lease = cache / ".rankload" / f"{NAME}.lease"
            for _ in range(3):  # its heartbeat is the keeper's
                before = lease.stat().st_mtime_ns
                wait_until(lambda before=before: lease.stat().st_mtime_ns != before, 10, "the lease is refreshed")
            (cache / "other").unlink()  # room for the record
            origin.release(NAME)
            [result] = group.wait()
        assert result.value == big_content and "Traceback" not in result.stderr
