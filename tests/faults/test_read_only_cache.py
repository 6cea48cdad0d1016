"""A cache that this user cannot write to: what is there is used, what is not is a clear error."""

from __future__ import annotations

import errno
import os

import pytest

import rankload
from harness import disks
from harness.checkpoints import digest_of
from harness.fetch_calls import error_in, errors_of, expect, fetch, files_in, load
from harness.ranks import run_ranks
from harness.users import ALICE, acting_as, public_directory

NAME = "file.bin"

needs_mounts = pytest.mark.skipif(disks.why_not() is not None, reason=str(disks.why_not()))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")


@pytest.mark.fault(25)
@needs_mounts
def test_miss_on_a_read_only_mount(origin, cache):
    url = origin.add(NAME, b"content")
    cache.mkdir()
    with disks.read_only(cache):
        errors = errors_of(fetch, url, cache)
    expect(errors, rankload.CacheError, f"cannot write {cache}/{NAME}", "Read-only", "model_dir=", "TORCH_HOME")
    assert {error.errno for error in errors} == {errno.EROFS} and isinstance(errors[0], OSError)
    assert origin.request_count() == 0


@pytest.mark.fault(25)
@needs_mounts
def test_cache_directory_that_cannot_be_made(origin, tmp_path):
    url = origin.add(NAME, b"content")
    with disks.read_only(tmp_path):
        errors = errors_of(fetch, url, tmp_path / "cache")
    expect(errors, rankload.CacheError, f"cannot make the cache directory {tmp_path}/cache", "model_dir=")
    assert {error.errno for error in errors} == {errno.EROFS}


@pytest.mark.fault(25)
@needs_mounts
def test_hit_on_a_read_only_mount(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    rankload.dist_fetch(url, cache)
    with disks.read_only(cache):
        results = run_ranks(load, 2, args=(url, cache))
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1
    assert "WARNING" not in results[0].stderr


@pytest.mark.fault(25)
@needs_mounts
def test_file_of_torch_hub_on_a_read_only_mount_is_served(origin, cache, checkpoint):
    """No record can be written: looked at anew by every call, and used."""
    cache.mkdir()
    (cache / checkpoint.name).write_bytes(checkpoint.path.read_bytes())
    url = origin.add(checkpoint.name, b"must not be asked for")
    with disks.read_only(cache):
        for _ in range(2):
            results = run_ranks(load, 2, args=(url, cache), kwargs={"check_hash": True})
            assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 0


@pytest.mark.fault(25)
@needs_root
@pytest.mark.parametrize("is_cached", [True, False])
def test_cache_of_another_user_that_is_mine_to_read_only(origin, checkpoint, is_cached):
    """One downloads for all, on a shared disk."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with public_directory() as cache:
        if is_cached:
            rankload.dist_fetch(url, cache)
        results = run_ranks(load_as, 2, args=(ALICE, url, cache))
        if is_cached:
            assert {result.value for result in results} == {digest_of(checkpoint.content)}
            assert "WARNING" not in results[0].stderr
        else:
            errors = [error_in(result) for result in results]
            expect(errors, rankload.CacheError, f"this user cannot write {cache}", "Permission denied", "model_dir=")
            assert {error.errno for error in errors} == {errno.EACCES}
            assert files_in(cache) == []
    assert origin.request_count() == int(is_cached)


@pytest.mark.fault(25)
@needs_root
def test_cached_file_that_is_not_mine_to_read(origin, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    with public_directory() as cache:
        rankload.dist_fetch(url, cache)
        (cache / checkpoint.name).chmod(0o600)
        errors = [error_in(result) for result in run_ranks(load_as, 2, args=(ALICE, url, cache))]
    expect(errors, rankload.RankloadError, str(cache / checkpoint.name), "Permission denied")
    assert origin.request_count() == 1


def load_as(rank, uid, url, cache):
    with acting_as(uid):
        return load(rank, url, cache)
