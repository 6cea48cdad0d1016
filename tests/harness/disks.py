"""Small real filesystems: full disks, real quotas, read-only mounts.

    with disks.tmpfs(tmp_path / "cache", size_bytes=1 << 20) as cache:
        ...

The test process, its ranks and its programs see them, nobody else does; see ``mounts``. Use
``pytest.mark.skipif(disks.why_not("mkfs.ext4") is not None, reason=str(disks.why_not("mkfs.ext4")))``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness import mounts
from harness.scripts import run_program

# Where administrators' programs are, which a user's PATH may lack.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def why_not(*programs: str) -> str | None:
    """Why there can be no such disk here, for which ``programs`` are needed; ``None`` if there can."""
    missing = [program for program in programs if shutil.which(program, path=_PATH) is None]
    return f"not installed: {', '.join(missing)}" if missing else mounts.why_not()


@contextlib.contextmanager
def tmpfs(mountpoint: Path, *, size_bytes: int, inodes: int = 0) -> Iterator[Path]:
    """A filesystem in memory, whose size the kernel rounds up to whole pages.

    Args:
        inodes: Files, directories and links that fit, the root included; 0 for any number.
    """
    options = f"size={size_bytes},nr_inodes={inodes},mode=755"
    with mounts.mounted("tmpfs", mountpoint, "tmpfs", options=options):
        yield mountpoint


@contextlib.contextmanager
def ext4_image(mountpoint: Path, *, size_bytes: int, inodes: int = 64) -> Iterator[Path]:
    """An ext4 in a file, without blocks reserved for root. Its own structures take part of the size.

    Args:
        inodes: In all; mkfs rounds up to what fills a block, and ext4 needs 11 of them itself.
    """
    make = ["mkfs.ext4", "-q", "-F", "-m0", f"-N{inodes}", "-Elazy_itable_init=0", "-O^has_journal"]
    with _loop_mounted(mountpoint, size_bytes, make):
        yield mountpoint


@contextlib.contextmanager
def btrfs_with_quota(mountpoint: Path, *, quota_bytes: int, size_bytes: int = 128 << 20) -> Iterator[Path]:
    """A directory on a btrfs in a file, in which no more than ``quota_bytes`` fit: a write beyond is EDQUOT.

    The quota counts 16 KiB for the directory itself, and statfs does not show it.

    Args:
        size_bytes: Of the whole, sparse; 109 MiB is the least that mkfs.btrfs accepts.
    """
    with _loop_mounted(mountpoint, size_bytes, ["mkfs.btrfs", "-q"]):
        limited = mountpoint / "limited"
        _run("btrfs", "quota", "enable", mountpoint)
        _run("btrfs", "subvolume", "create", limited)
        _run("btrfs", "qgroup", "limit", str(quota_bytes), limited)
        yield limited


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[Path]:
    """Makes what is in ``directory`` unchangeable, to root too; every attempt is EROFS."""
    with mounts.mounted(str(directory), directory, "none", mounts.MS_BIND):
        mounts.mount("none", directory, "none", mounts.MS_REMOUNT | mounts.MS_BIND | mounts.MS_RDONLY)
        yield directory


@contextlib.contextmanager
def _loop_mounted(mountpoint: Path, size_bytes: int, make: list[str]) -> Iterator[None]:
    assert (problem := why_not(make[0], "mount")) is None, problem
    mountpoint.mkdir(parents=True, exist_ok=True)
    image = mountpoint.with_name(f"{mountpoint.name}.image")
    with image.open("xb") as file:
        file.truncate(size_bytes)
    try:
        _run(*make, image)
        _run("mount", "-o", "loop", image, mountpoint)  # the loop device goes with the mount
        try:
            yield
        finally:
            mounts.unmount(mountpoint)
    finally:
        image.unlink()


def _run(*words: str | Path) -> None:
    run_program(words, env={"PATH": _PATH}).check()
