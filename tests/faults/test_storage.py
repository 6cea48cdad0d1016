"""Disks that are full or read-only, on real mounts in a mount namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import checkpoints

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts filesystems")


def run_with_mounts(mounts: str, code: str) -> str:
    """Runs Python code in a mount namespace after the shell commands in ``mounts``; returns its stdout."""
    program = f'{mounts}\nexec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", program],
        env={**os.environ, "CODE": code},
        check=False,  # the assertion below shows what it wrote
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_directory_that_cannot_be_written(origin, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    code = f"""
import errno, rankload
try:
    rankload.dist_fetch({origin.add("file.bin", b"content")!r}, {str(cache)!r})
except rankload.CacheError as error:
    assert isinstance(error, OSError) and error.errno == errno.EROFS
    print(error)
"""
    output = run_with_mounts(f"mount --bind {cache} {cache}; mount -o remount,bind,ro {cache}", code)
    assert f"cannot write {cache}/file.bin" in output
    assert "Read-only" in output and "model_dir=" in output and "TORCH_HOME" in output


def test_directory_that_cannot_be_made(origin, tmp_path):
    code = f"""
import rankload
try:
    rankload.dist_fetch({origin.add("file.bin", b"content")!r}, {str(tmp_path / "cache")!r})
except rankload.CacheError as error:
    print(error)
"""
    output = run_with_mounts(f"mount --bind {tmp_path} {tmp_path}; mount -o remount,bind,ro {tmp_path}", code)
    assert f"cannot make the cache directory {tmp_path}/cache" in output and "model_dir=" in output


def test_cached_file_on_a_read_only_mount_is_served(origin, tmp_path):
    import rankload

    file, cache = checkpoints.write_zip(tmp_path), tmp_path / "cache"
    url = origin.add("model.pth", file.path)
    rankload.dist_fetch(url, cache)
    code = f"""
import rankload
print(len(rankload.dist_load_state_dict_from_url({url!r}, {str(cache)!r})))
"""
    output = run_with_mounts(f"mount --bind {cache} {cache}; mount -o remount,bind,ro {cache}", code)
    assert int(output) == len(file.content)
    assert origin.request_count() == 1


def test_file_of_torch_hub_on_a_read_only_mount_is_served(origin, tmp_path):
    """No record can be written: looked at anew by every call, and used."""
    file = checkpoints.write_zip(tmp_path / "cache")
    url = origin.add(file.name, b"must not be asked for")
    code = f"""
import rankload
for _ in range(2):
    print(len(rankload.dist_load_state_dict_from_url({url!r}, {str(file.path.parent)!r}, check_hash=True)))
"""
    cache = file.path.parent
    output = run_with_mounts(f"mount --bind {cache} {cache}; mount -o remount,bind,ro {cache}", code)
    assert output.split() == [str(len(file.content))] * 2
    assert origin.request_count() == 0


@pytest.mark.parametrize("has_length", [True, False])
def test_full_disk(origin, tmp_path, big_content, has_length):
    """With a length it is seen before the first byte, without one at the write that fails."""
    url = origin.add("file.bin", big_content, content_length=has_length)
    cache = tmp_path / "cache"
    cache.mkdir()
    code = f"""
import errno, os, rankload
try:
    rankload.dist_fetch({url!r}, {str(cache)!r})
except rankload.CacheError as error:
    assert error.errno == errno.ENOSPC
    print(error)
print(sorted(name for _, _, names in os.walk({str(cache)!r}) for name in names))
"""
    output = run_with_mounts(f"mount -t tmpfs -o size=1m none {cache}", code)
    error, names = output.splitlines()
    assert f"cannot write {cache}/file.bin" in error and "No space left on device" in error
    assert f"free in {cache}" in error and "make room" in error
    assert ("8.39 MB needed, 1.0" in error) or not has_length, error
    assert names == "[]"
    origin.wait_until_idle()
    assert origin.completed_count() == 0


def test_private_mounts_leave_the_machine_alone(tmp_path):
    run_with_mounts(f"mount -t tmpfs none {tmp_path}", "")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
