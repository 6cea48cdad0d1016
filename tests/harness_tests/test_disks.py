"""Disks of the harness are as small, limited or read-only as they say, and gone afterwards."""

import errno
import os
import sys
from pathlib import Path

import pytest

from harness import disks, mounts
from harness.ranks import run_ranks
from harness.scripts import run_program, start_script
from harness.waiting import wait_until

PYTHONPATH = {"PYTHONPATH": str(Path(__file__).parent.parent)}
PROGRAMS = ("mkfs.ext4", "mkfs.btrfs", "btrfs", "mount")
pytestmark = pytest.mark.skipif(disks.why_not(*PROGRAMS) is not None, reason=str(disks.why_not(*PROGRAMS)))


def write_in_blocks(path, size_bytes):
    """Writes until it fails; returns (bytes written, errno)."""
    written = 0
    with open(path, "wb", buffering=0) as file:
        try:
            while written < size_bytes:
                written += file.write(bytes(min(1 << 16, size_bytes - written)))
            os.fsync(file.fileno())
        except OSError as error:
            return written, error.errno
    return written, 0


def make_files(directory, count):
    """Makes empty files until it fails; returns (their number, errno)."""
    for number in range(count):
        try:
            (directory / f"{number}").touch()
        except OSError as error:
            return number, error.errno
    return count, 0


def test_a_full_tmpfs(tmp_path):
    with disks.tmpfs(tmp_path / "disk", size_bytes=1 << 20) as disk:
        assert os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize == 1 << 20
        assert write_in_blocks(disk / "x", 2 << 20) == (1 << 20, errno.ENOSPC)
        with open(disk / "y", "wb") as file, pytest.raises(OSError, match="No space left"):
            os.posix_fallocate(file.fileno(), 0, 4096)
    assert os.listdir(tmp_path / "disk") == []


def test_a_tmpfs_without_inodes(tmp_path):
    with disks.tmpfs(tmp_path / "disk", size_bytes=1 << 20, inodes=4) as disk:
        assert make_files(disk, 10) == (3, errno.ENOSPC)


def test_a_full_ext4(tmp_path):
    with disks.ext4_image(tmp_path / "disk", size_bytes=4 << 20) as disk:
        written, code = write_in_blocks(disk / "x", 8 << 20)
        assert code == errno.ENOSPC and 3 << 20 < written < 4 << 20
        os.unlink(disk / "x")
        assert make_files(disk, 100) == (64 - 11, errno.ENOSPC)
    assert os.listdir(tmp_path) == ["disk"]


def test_a_real_quota(tmp_path):
    with disks.btrfs_with_quota(tmp_path / "disk", quota_bytes=4 << 20) as directory:
        written, code = write_in_blocks(directory / "x", 8 << 20)
        assert code == errno.EDQUOT and 3 << 20 < written <= 4 << 20
        assert os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize > 8 << 20


def test_a_read_only_directory(tmp_path):
    (tmp_path / "file").write_text("content")
    with disks.read_only(tmp_path):
        assert (tmp_path / "file").read_text() == "content"
        for attempt in (tmp_path / "new").touch, (tmp_path / "file").unlink, (tmp_path / "folder").mkdir:
            with pytest.raises(OSError, match="Read-only") as caught:
                attempt()
            assert caught.value.errno == errno.EROFS
    (tmp_path / "file").unlink()


def list_directory(rank, path):
    return os.listdir(path)


def test_ranks_and_programs_see_it(tmp_path):
    with disks.tmpfs(tmp_path / "disk", size_bytes=1 << 20) as disk:
        (disk / "file").touch()
        assert run_ranks(list_directory, 1, env="none", args=(disk,))[0].value == ["file"]
        assert run_program(["ls", disk]).check().stdout == "file\n"


def test_it_goes_while_a_file_is_open(tmp_path):
    with disks.tmpfs(tmp_path / "disk", size_bytes=1 << 20) as disk:
        file = open(disk / "file", "w+")  # noqa: SIM115 - open beyond the mount
    assert os.listdir(tmp_path / "disk") == []
    with file:
        file.write("still there")


def test_it_goes_after_an_error_in_the_test(tmp_path):
    with pytest.raises(ZeroDivisionError), disks.tmpfs(tmp_path / "disk", size_bytes=1 << 20) as disk:
        _ = 1 / 0
    assert not disk.is_mount()


ISOLATED = """
import signal, sys
from pathlib import Path
from harness import disks, mounts
mounts.isolate()
with disks.ext4_image(Path(sys.argv[1]), size_bytes=4 << 20) as disk:
    [device] = [line.split()[0] for line in open("/proc/self/mounts") if line.split()[1] == str(disk)]
    print(device, flush=True)
    signal.pause()
"""


def test_nobody_else_sees_it_and_a_killed_test_process_leaves_nothing(tmp_path):
    with start_script(ISOLATED, tmp_path / "disk", env={**PYTHONPATH, "TMPDIR": str(tmp_path)}) as script:
        wait_until(lambda: script.stdout or not script.is_alive, 20, "its disk is mounted")
        device = Path(script.stdout.strip()).name
        backing = Path(f"/sys/block/{device}/loop/backing_file")
        assert str(tmp_path) in backing.read_text(), script.stderr
        assert not (tmp_path / "disk").is_mount()

    def is_free() -> bool:
        try:
            return str(tmp_path) not in backing.read_text()  # another test may have taken the device by now
        except OSError:
            return True

    wait_until(is_free, 10, f"{device} is free")


def test_where_mounting_is_not_allowed_it_says_so(tmp_path):
    code = "from harness import mounts; mounts.isolate(); print(mounts.why_not())"
    words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", code]
    result = run_program(words, env=PYTHONPATH)
    assert "no mount namespace of our own, which needs root" in result.check().stdout
    assert mounts.why_not() is None
