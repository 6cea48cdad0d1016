"""A cached file: used without a request and without a second hash while its record vouches for it, else checked."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil

import pytest

import rankload
from harness import checkpoints
from harness.checkpoints import digest_of
from harness.fetch_calls import files_in, load, whole_log
from harness.ranks import run_ranks
from rankload._cache.layout import Entry
from rankload._cache.record import find_record
from rankload._urls import Url


def bytes_read() -> int:
    """What this process has read so far, from the page cache or from anywhere (proc(5), io)."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def read_during(call) -> int:
    before = bytes_read()
    call()
    return bytes_read() - before


@pytest.fixture
def cached(origin, cache, big_content):
    """The URL and the path of a file that has been fetched."""
    url = origin.add("file.bin", big_content)
    return url, rankload.dist_fetch(url, cache)


def record_of(path):
    record = find_record(path.parent / ".rankload" / f"{path.name}.json").record
    assert record is not None
    return record


def rewrite_record(path, text):
    record = path.parent / ".rankload" / f"{path.name}.json"
    record.write_text(text)
    return record


def test_record_tells_what_was_verified(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    path = rankload.dist_fetch(url + "?sig=SECRET", cache, check_hash=True)
    found = json.loads((cache / ".rankload" / f"{checkpoint.name}.json").read_text())
    status = path.stat()
    assert found["url"] == url + "?…"
    assert (found["size_bytes"], found["mtime_ns"], found["inode"]) == (
        status.st_size,
        status.st_mtime_ns,
        status.st_ino,
    )
    assert (found["sha256"], found["vouched_by"], found["source"]) == (checkpoint.sha256, "hash_prefix", "download")
    assert found["etag"] == f'"{checkpoint.sha256[:16]}"'
    assert "SECRET" not in str(found)


def test_warm_call_makes_no_request_and_reads_no_byte(origin, cache, cached, big_content):
    url, _ = cached
    assert read_during(lambda: rankload.dist_fetch(url, cache)) < len(big_content) / 10
    assert origin.request_count() == 1


def test_warm_call_with_the_digest_that_the_record_has(origin, cache, cached, big_content):
    url, path = cached
    sha256 = record_of(path).sha256
    assert read_during(lambda: rankload.dist_fetch(url, cache, sha256=sha256)) < len(big_content) / 10
    assert origin.request_count() == 1


def test_warm_call_of_all_ranks(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path)
    for _ in range(2):
        results = run_ranks(load, 3, args=(url, cache))
        assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1


def test_verify_always_reads_every_byte(origin, cache, cached, big_content):
    url, _ = cached
    assert read_during(lambda: rankload.dist_fetch(url, cache, verify="always")) >= len(big_content)
    assert origin.request_count() == 1


@pytest.mark.fault(19)
def test_verify_always_finds_what_stat_does_not_show(origin, cache, cached, big_content):
    """A bit that flips on the disk: same inode, same size, same time."""
    url, path = cached
    flip(path, keeping_mtime=True)
    assert rankload.dist_fetch(url, cache).read_bytes() != big_content  # what verify="once" does not promise
    assert rankload.dist_fetch(url, cache, verify="always").read_bytes() == big_content
    assert origin.request_count() == 2


def test_verify_never_does_not_hash_a_touched_file(origin, cache, cached, big_content):
    url, path = cached
    os.utime(path)
    assert read_during(lambda: rankload.dist_fetch(url, cache, verify="never")) < len(big_content) / 10
    assert origin.request_count() == 1


@pytest.mark.fault(20)
def test_verify_never_does_not_take_a_truncated_file(origin, cache, cached, big_content):
    """The length costs nothing to compare."""
    url, path = cached
    os.truncate(path, 1000)
    assert rankload.dist_fetch(url, cache, verify="never").read_bytes() == big_content


def test_touched_file_is_hashed_once(origin, cache, cached, big_content):
    url, path = cached
    os.utime(path)
    assert read_during(lambda: rankload.dist_fetch(url, cache)) >= len(big_content)
    assert read_during(lambda: rankload.dist_fetch(url, cache)) < len(big_content) / 10
    assert origin.request_count() == 1


def test_copied_cache_is_hashed_once(origin, cache, cached, big_content, tmp_path):
    """cp -p keeps the times, not the inodes."""
    url, path = cached
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)  # copies with copy2: times are kept
    assert (copy / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
    assert read_during(lambda: rankload.dist_fetch(url, copy)) >= len(big_content)
    assert record_of(copy / path.name).inode == (copy / path.name).stat().st_ino
    assert read_during(lambda: rankload.dist_fetch(url, copy)) < len(big_content) / 10
    assert origin.request_count() == 1


@pytest.mark.fault(19)
def test_flipped_bit_is_fetched_again(origin, cache, cached, big_content, caplog):
    url, path = cached
    flip(path)
    with whole_log(caplog):
        assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert "its record" in caplog.text and "quarantine" in caplog.text
    kept = path.parent / ".rankload" / "quarantine" / path.name
    assert kept.stat().st_size == len(big_content) and kept.read_bytes() != big_content
    assert "its record" in json.loads(kept.with_name(f"{path.name}.json").read_text())["reason"]
    assert origin.request_count() == 2


@pytest.mark.fault(20)
def test_truncated_file_is_fetched_again(origin, cache, cached, big_content, caplog):
    url, path = cached
    os.truncate(path, len(big_content) - 1)
    with whole_log(caplog):
        assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert f"{len(big_content) - 1} bytes, not {len(big_content)}" in caplog.text
    assert origin.request_count() == 2


@pytest.mark.fault(20)
def test_empty_file_is_fetched_again(origin, cache, cached, big_content):
    url, path = cached
    os.truncate(path, 0)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert origin.request_count() == 2


def test_mapping_of_the_replaced_file_goes_on(origin, cache, cached, big_content):
    """A job that maps the file must not see it change, nor die of SIGBUS, when another one fetches it again."""
    url, path = cached
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flip(path)
    as_it_was, inode = bytes(mapped), path.stat().st_ino
    rankload.dist_fetch(url, cache)
    assert path.stat().st_ino != inode and path.read_bytes() == big_content
    assert bytes(mapped) == as_it_was


def test_file_that_is_not_what_sha256_says_is_fetched_again(origin, cache, checkpoint, other_checkpoint):
    url = origin.add("model.pth", checkpoint.path)
    rankload.dist_fetch(url, cache)
    origin.add("model.pth", other_checkpoint.path)  # the origin has a new version under the same URL
    path = rankload.dist_fetch(url, cache, sha256=other_checkpoint.sha256)
    assert path.read_bytes() == other_checkpoint.path.read_bytes()


def test_wrong_sha256_leaves_the_cached_file_alone(origin, cache, cached, big_content):
    url, path = cached
    with pytest.raises(rankload.errors.DigestMismatchError):
        rankload.dist_fetch(url, cache, sha256="0" * 64)
    assert path.read_bytes() == big_content
    rankload.dist_fetch(url, cache)
    assert origin.request_count() == 3


DAMAGED_RECORDS = {
    "empty": "",
    "not json": "{",
    "a list": "[]",
    "no fields": "{}",
    "binary": "\0\x01",
    "wrong types": json.dumps(
        {
            "url": 1,
            "url_key": 2,
            "size_bytes": "3",
            "mtime_ns": None,
            "inode": [],
            "etag": 4,
            "sha256": 5,
            "vouched_by": 6,
            "source": 7,
        }
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_RECORDS)
def test_damaged_record(origin, cache, cached, big_content, caplog, damage):
    """The file is somebody's: it is neither used nor replaced, unless its digest is known; nobody crashes."""
    url, path = cached
    record = rewrite_record(path, DAMAGED_RECORDS[damage])
    before = path.stat()
    assert rankload.dist_fetch(url, cache, sha256=hashlib.sha256(big_content).hexdigest()) == path
    with whole_log(caplog):
        found = rankload.dist_fetch(url, cache)
    assert found.read_bytes() == big_content and found != path
    assert "unreadable record" in caplog.text and str(record) in caplog.text
    assert record.read_text() == DAMAGED_RECORDS[damage] and path.stat() == before
    assert origin.request_count() == 2


def test_record_with_one_wrong_type(origin, cache, cached):
    url, path = cached
    found = json.loads((cache / ".rankload" / "file.bin.json").read_text())
    for name in found:
        rewrite_record(path, json.dumps({**found, name: ["?"]}))
        assert rankload.dist_fetch(url, cache) == Entry(path).separate(Url.parse(url)).path


def test_record_that_cannot_be_read(origin, cache, cached, big_content):
    url, path = cached
    record = path.parent / ".rankload" / "file.bin.json"
    record.unlink()
    record.mkdir()
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert record.is_dir() and origin.request_count() == 2


def test_place_of_the_records_is_a_file(origin, cache):
    """Without a record another URL of that name would get the file: nothing is published."""
    cache.mkdir()
    (cache / ".rankload").touch()
    with pytest.raises(rankload.CacheError, match=r"\.rankload is not a directory"):
        rankload.dist_fetch(origin.add("file.bin", b"content"), cache)
    assert files_in(cache) == [".rankload"] and origin.request_count() == 0


@pytest.mark.fault(20)
def test_truncated_file_of_the_legacy_format(origin, cache, tmp_path):
    """No central directory, no header with lengths: torch's own loader would read past the end."""
    file = checkpoints.write_legacy(tmp_path / "source")
    url = origin.add("legacy.pth", file.path)
    cache.mkdir()
    (cache / "legacy.pth").write_bytes(file.path.read_bytes()[:-100])
    [result] = run_ranks(load, 1, env="none", args=(url, cache))
    assert result.value == digest_of(file.content)
    assert origin.request_count() == 1


def test_nothing_but_the_file_and_its_record_stays(origin, cache, cached):
    assert files_in(cache) == [".rankload/file.bin.json", "file.bin"]


def flip(path, *, keeping_mtime=False):
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    # Set in any case: two writes may fall into one tick of the file system's clock.
    after = status.st_mtime_ns + (0 if keeping_mtime else 1_000_000)
    os.utime(path, ns=(status.st_atime_ns, after))
