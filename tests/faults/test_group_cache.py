"""A cache that a group shares: who may read and write what lies in it, whatever the umask of the one who came first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import rankload
from harness.checkpoints import digest_of
from harness.fetch_calls import fetch, files_in, left_in, load
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.users import ALICE, BOB, GROUP, acting_as, public_directory
from rankload._cache.record import find_record

MIB = 1 << 20
NAME = "file.bin"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users")


@pytest.fixture
def group_cache():
    """What an administrator makes with chgrp and chmod g+ws."""
    with public_directory(0o2775, GROUP) as directory:
        yield directory


def fetch_as(rank, uid, umask, url, cache):
    with acting_as(uid, [GROUP], umask):
        return Path(fetch(rank, url, cache)).read_bytes()


def fetch_expecting_as(rank, uid, umask, url, cache, sha256):
    with acting_as(uid, [GROUP], umask):
        try:
            return fetch(rank, url, cache, sha256=sha256)
        except rankload.RankloadError as error:
            return type(error).__name__


def load_as(rank, uid, umask, url, cache):
    with acting_as(uid, [GROUP], umask):
        return load(rank, url, cache, verify="always")


def run_as(function, uid, umask, *args):
    [result] = run_ranks(function, 1, env="none", args=(uid, umask, *args))
    return result


@pytest.mark.fault(26)
@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_group_has_access_to_all_that_is_made(origin, group_cache, big_content, monkeypatch, umask):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))
    url = origin.add(NAME, big_content, hold_at=MIB // 2)
    with start_ranks(fetch_as, 1, env="none", args=(ALICE, umask, url, group_cache)) as group:
        origin.wait_until_held(NAME)
        wait_until(lambda: list(group_cache.glob("*.journal")), 10, "the journal is there")
        assert_shared(group_cache, but_for=[".lease"])
        kinds = {Path(name).suffix for name in files_in(group_cache)}
        assert kinds == {".partial", ".journal", ".lease"}
        origin.release(NAME)
        assert group.wait()[0].value == big_content
    assert files_in(group_cache) == [f".rankload/{NAME}.json", NAME]
    assert_shared(group_cache)
    assert {path.stat().st_uid for path in group_cache.rglob("*")} == {ALICE}


@pytest.mark.fault(26)
def test_another_member_uses_checks_and_replaces_what_one_has_fetched(origin, group_cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    run_as(fetch_as, ALICE, 0o077, url, group_cache).value  # noqa: B018 - raises if it failed
    assert run_as(load_as, BOB, 0o077, url, group_cache).value == digest_of(checkpoint.content)
    assert origin.request_count() == 1
    with (group_cache / checkpoint.name).open("r+b") as file:  # a flipped bit
        file.seek(checkpoint.size // 2)
        byte = file.read(1)[0]
        file.seek(checkpoint.size // 2)
        file.write(bytes([byte ^ 1]))
    result = run_as(load_as, BOB, 0o077, url, group_cache)
    assert result.value == digest_of(checkpoint.content)
    assert "set aside" in result.stderr or "fetching it again" in result.stderr
    assert origin.request_count() == 2
    assert (group_cache / checkpoint.name).stat().st_uid == BOB
    assert find_record(group_cache / ".rankload" / f"{checkpoint.name}.json").record.sha256 == checkpoint.sha256
    assert_shared(group_cache)
    assert left_in(group_cache) == []


@pytest.mark.fault(26)
def test_what_is_set_aside_and_why_is_the_groups_too(origin, group_cache, checkpoint):
    """One member's file makes room for the next one's, with its own reason."""
    url = origin.add("model.pth", checkpoint.path)
    notes = []
    for uid, digit in ((ALICE, "a"), (BOB, "b")):
        result = run_as(fetch_expecting_as, uid, 0o077, url, group_cache, digit * 64)
        assert result.value == "DigestMismatchError"
        notes.append((group_cache / ".rankload" / "quarantine" / "model.pth.json").read_text())
        assert_shared(group_cache)
        assert {path.name for path in (group_cache / ".rankload" / "quarantine").iterdir()} == {
            "model.pth",
            "model.pth.json",
        }
    assert "aaaa" in notes[0] and "bbbb" in notes[1]


@pytest.mark.fault(26)
def test_second_url_of_the_same_name_in_a_directory_of_the_groups(origin, group_cache, checkpoint, other_checkpoint):
    first, second = origin.add("a/model.pth", checkpoint.path), origin.add("b/model.pth", other_checkpoint.path)
    run_as(fetch_as, ALICE, 0o077, first, group_cache).value  # noqa: B018
    run_as(fetch_as, ALICE, 0o077, second, group_cache).value  # noqa: B018
    assert_shared(group_cache)
    assert run_as(load_as, BOB, 0o077, second, group_cache).value == digest_of(other_checkpoint.content)
    assert origin.request_count() == 2


@pytest.mark.fault(26)
def test_dead_partial_of_another_member_is_cleared_away(origin, group_cache, big_content, monkeypatch):
    """Nobody goes on with bytes that somebody else wrote."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))
    url = origin.add(NAME, big_content, hold_at=MIB // 2)
    with start_ranks(fetch_as, 1, env="none", args=(ALICE, 0o077, url, group_cache)) as group:
        origin.wait_until_held(NAME)
        group.kill(0)
        group.wait_for_end(0)
    url = origin.add(NAME, big_content)
    result = run_as(fetch_as, BOB, 0o077, url, group_cache)
    assert result.value == big_content and "belongs to another user" in result.stderr
    assert [name for name in files_in(group_cache) if ".partial" in name] == []


@pytest.mark.fault(26)
@pytest.mark.parametrize("mode", [0o755, 0o2755, 0o775])
def test_elsewhere_the_umask_decides(origin, checkpoint, mode):
    """Only setgid and writable by the group asks for sharing."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with public_directory(mode, GROUP) as directory:
        os.chown(directory, ALICE, -1)
        assert run_as(load_as, ALICE, 0o077, url, directory).value == digest_of(checkpoint.content)
        for path in directory.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o777 == (0o700 if path.is_dir() else 0o600), path


def assert_shared(directory: Path, but_for: list[str] = ()) -> None:
    """Everything below is the group's to read and to replace; directories hand the group on."""
    for path in directory.rglob("*"):
        status = path.stat()
        wanted = 0o2070 if path.is_dir() else 0o040
        assert status.st_gid == GROUP, path
        if path.suffix not in but_for:
            assert stat.S_IMODE(status.st_mode) & wanted == wanted, f"{path}: {oct(status.st_mode)}"
            assert path.is_dir() or not status.st_mode & 0o022, f"a mapped file must not change: {path}"


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_everybody_keeps_records_where_everybody_writes(origin, mode):
    """Without them, who comes later would take another URL's file for the one that is asked for."""
    with public_directory(mode) as cache:
        run_as(fetch_as, ALICE, 0o022, origin.add("another.bin", b"another"), cache)  # makes the place of the records
        for number in range(2):
            url = origin.add(f"{number}/{NAME}", b"content %d" % number)
            assert run_as(fetch_as, BOB, 0o022, url, cache).value == b"content %d" % number
