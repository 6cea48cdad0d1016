"""Symbolic links where rankload's own files should be: whoever planted one must not decide where we write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import rankload
from harness.checkpoints import digest_of
from harness.fetch_calls import error_in, errors_of, expect, fetch, files_in, left_in, load, whole_log
from harness.ranks import run_ranks
from harness.users import ALICE, BOB, acting_as, public_directory
from rankload._cache.layout import Entry
from rankload._cache.record import find_record
from rankload._fetch.partials.journal import Journal, PartialContent, journal_path
from rankload._fetch.partials.owner import abandoned_path
from rankload._urls import Url, url_key

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users")
PRECIOUS = b"precious " * 1000


@pytest.fixture
def victim(tmp_path):
    """A file that must stay as it is, whatever the test does."""
    path = tmp_path / "victim"
    path.write_bytes(PRECIOUS)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_bytes() == PRECIOUS
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)


@pytest.fixture
def own(cache):
    """rankload's own directory in a cache that is there already."""
    path = cache / ".rankload"
    path.mkdir(parents=True)
    return path


def load_as(rank, uid, url, cache):
    with acting_as(uid):
        return load(rank, url, cache)


def check_loaded(url, cache, checkpoint):
    """Loads in two ranks; returns rank 0's log."""
    results = run_ranks(load, 2, args=(url, cache))
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    return results[0].stderr


# --- partial files and journals ------------------------------------------------------------------------------------


def plant_partial(cache, url, checkpoint, plant):
    """What looks like a dead download of the same content, complete by its journal; ``plant`` makes the file."""
    cache.mkdir(exist_ok=True)
    path = abandoned_path(Entry(cache / checkpoint.name))
    plant(path)
    etag = f'"{checkpoint.sha256[:16]}"'
    Journal(path, PartialContent(url_key(url), checkpoint.size, etag, None, None), [(0, checkpoint.size)]).close()
    return path


@pytest.mark.fault(28)
@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "hard link", "pipe", "directory"])
def test_partial_that_is_no_file_of_our_own(origin, cache, checkpoint, victim, tmp_path, kind):
    url = origin.add(checkpoint.name, checkpoint.path)
    plant = {
        "symlink": lambda path: path.symlink_to(victim),
        "dangling symlink": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "hard link": lambda path: path.hardlink_to(victim),
        "pipe": os.mkfifo,
        "directory": Path.mkdir,
    }[kind]
    path = plant_partial(cache, url, checkpoint, plant)
    check_loaded(url, cache, checkpoint)
    assert origin.bytes_sent() == checkpoint.size
    assert not (tmp_path / "nowhere").exists()
    if kind != "directory":
        assert not os.path.lexists(path)
        assert files_in(cache) == [f".rankload/{checkpoint.name}.json", checkpoint.name]


def test_partial_that_is_a_file_of_our_own_is_used(origin, cache, checkpoint):
    """What the tests around this one rely on: nothing else is wrong with what they plant."""
    url = origin.add(checkpoint.name, checkpoint.path)
    plant_partial(cache, url, checkpoint, lambda path: path.write_bytes(checkpoint.path.read_bytes()))
    check_loaded(url, cache, checkpoint)
    assert origin.bytes_sent() == 0


@pytest.mark.fault(28)
@pytest.mark.parametrize("kind", ["symlink", "pipe"])
def test_journal_that_is_no_file(origin, cache, checkpoint, tmp_path, kind):
    url = origin.add(checkpoint.name, checkpoint.path)
    path = plant_partial(cache, url, checkpoint, lambda path: path.write_bytes(bytes(checkpoint.size)))
    real = tmp_path / "journal"
    journal_path(path).rename(real)
    text = real.read_bytes()
    if kind == "symlink":
        journal_path(path).symlink_to(real)
    else:
        os.mkfifo(journal_path(path))
    check_loaded(url, cache, checkpoint)
    assert real.read_bytes() == text
    assert left_in(cache) == []


# --- the lease -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(28)
@pytest.mark.parametrize("is_dangling", [False, True])
def test_lease(origin, cache, checkpoint, own, victim, tmp_path, is_dangling):
    url = origin.add(checkpoint.name, checkpoint.path)
    target = tmp_path / "nowhere" if is_dangling else victim
    link = own / f"{checkpoint.name}.lease"
    link.symlink_to(target)
    assert "it is a symbolic link" in check_loaded(url, cache, checkpoint)
    assert link.readlink() == target and target.exists() != is_dangling
    assert origin.request_count() == 1


# --- records -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(28)
@pytest.mark.parametrize("is_cached", [False, True])
def test_record(origin, cache, checkpoint, own, victim, is_cached):
    """It is not believed. Without a file it stands for nothing; beside one, that is somebody's, and both stay."""
    url = origin.add(checkpoint.name, checkpoint.path)
    if is_cached:
        (cache / checkpoint.name).write_bytes(PRECIOUS)
    record = own / f"{checkpoint.name}.json"
    record.symlink_to(victim)
    log = check_loaded(url, cache, checkpoint)
    assert "unreadable record" in log
    assert record.is_symlink() == is_cached
    if is_cached:
        assert (cache / checkpoint.name).read_bytes() == PRECIOUS
    else:
        assert find_record(record).record.size_bytes == checkpoint.size
    assert origin.request_count() == 1


@pytest.mark.fault(28)
def test_record_that_vouches_from_elsewhere(origin, cache, checkpoint, other_checkpoint, tmp_path):
    """A link to a record that says the wrong file is the right one."""
    url = origin.add("model.pth", checkpoint.path)
    rankload.dist_fetch(url, cache)
    record = cache / ".rankload" / "model.pth.json"
    forged = tmp_path / "forged.json"
    (cache / "model.pth").write_bytes(other_checkpoint.path.read_bytes())
    status = (cache / "model.pth").stat()
    facts = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    forged.write_text(json.dumps(json.loads(record.read_text()) | facts))
    record.unlink()
    record.symlink_to(forged)
    assert rankload.dist_fetch(url, cache, sha256=checkpoint.sha256).read_bytes() == checkpoint.path.read_bytes()
    assert origin.request_count() == 2


@pytest.mark.fault(28)
def test_pipe_in_the_place_of_the_record(origin, cache, checkpoint, own):
    """Opening it would wait for its writer, for ever."""
    url = origin.add(checkpoint.name, checkpoint.path)
    (cache / checkpoint.name).write_bytes(checkpoint.path.read_bytes())
    os.mkfifo(own / f"{checkpoint.name}.json")
    assert "unreadable record" in check_loaded(url, cache, checkpoint)
    assert origin.request_count() == 1


# --- directories of rankload's own -----------------------------------------------------------------------------------


@pytest.mark.fault(28)
@pytest.mark.parametrize("is_dangling", [False, True])
def test_own_directory(origin, cache, checkpoint, tmp_path, is_dangling):
    url = origin.add(checkpoint.name, checkpoint.path)
    elsewhere = tmp_path / "elsewhere"
    cache.mkdir()
    (cache / ".rankload").symlink_to(elsewhere)
    if not is_dangling:
        elsewhere.mkdir()
    errors = errors_of(load, url, cache)
    expect(errors, rankload.CacheError, f"{cache}/.rankload is a symbolic link: refused", "remove it")
    assert {error.path for error in errors} == {f"{cache}/.rankload"}
    assert origin.request_count() == 0
    assert elsewhere.exists() != is_dangling
    assert is_dangling or list(elsewhere.iterdir()) == []
    assert [path.name for path in cache.iterdir()] == [".rankload"]


@pytest.mark.fault(28)
def test_quarantine(origin, cache, checkpoint, own, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (own / "quarantine").symlink_to(elsewhere)
    url = origin.add(checkpoint.name, checkpoint.path)
    expect(errors_of(fetch, url, cache, sha256="a" * 64), rankload.errors.DigestMismatchError, url)
    assert list(elsewhere.iterdir()) == []
    assert files_in(cache) == [] or files_in(cache) == [".rankload/quarantine"]


@pytest.mark.fault(28)
def test_note_on_what_is_set_aside(origin, cache, checkpoint, own, victim):
    (own / "quarantine").mkdir()
    note = own / "quarantine" / f"{checkpoint.name}.json"
    note.symlink_to(victim)
    url = origin.add(checkpoint.name, checkpoint.path)
    expect(errors_of(fetch, url, cache, sha256="a" * 64), rankload.errors.DigestMismatchError, "kept at")
    assert not note.is_symlink() and "aaaa" in json.loads(note.read_text())["reason"]


@pytest.mark.fault(28)
def test_directory_of_a_second_url(origin, cache, checkpoint, other_checkpoint, tmp_path):
    first, second = origin.add("a/model.pth", checkpoint.path), origin.add("b/model.pth", other_checkpoint.path)
    rankload.dist_fetch(first, cache)
    separate = Entry(cache / "model.pth").separate(Url.parse(second)).path.parent
    (tmp_path / "elsewhere").mkdir()
    separate.symlink_to(tmp_path / "elsewhere")
    expect(errors_of(load, second, cache), rankload.CacheError, f"{separate} is a symbolic link: refused")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- the cached file -----------------------------------------------------------------------------------------------


@pytest.mark.fault(28)
def test_own_link_to_a_file_elsewhere_is_read(origin, cache, checkpoint, tmp_path):
    """People do that to share one copy: it is theirs to decide."""
    url = origin.add(checkpoint.name, checkpoint.path)
    cache.mkdir()
    (cache / checkpoint.name).symlink_to(checkpoint.path)
    check_loaded(url, cache, checkpoint)
    assert (cache / checkpoint.name).is_symlink()
    assert origin.request_count() == 1  # whether it is the origin's


@pytest.mark.fault(28)
@pytest.mark.parametrize("how", ["another digest", "no checkpoint", "empty", "dangling"])
def test_own_link_stays_and_is_never_written_through(origin, cache, checkpoint, victim, tmp_path, caplog, how):
    """Whoever made it, rankload did not: the file gets an entry of its own."""
    url = origin.add(checkpoint.name, checkpoint.path)
    cache.mkdir()
    link = cache / checkpoint.name
    target = {"empty": tmp_path / "empty", "dangling": tmp_path / "nowhere"}.get(how, victim)
    if how == "empty":
        target.touch()
    link.symlink_to(target)
    arguments = {"sha256": checkpoint.sha256} if how == "another digest" else {}
    with whole_log(caplog):
        content = rankload.dist_load_state_dict_from_url(url, cache, **arguments)
    assert digest_of(content) == digest_of(checkpoint.content)
    assert link.is_symlink() and link.readlink() == target
    assert how != "empty" or target.stat().st_size == 0
    assert how != "dangling" or not target.exists()
    assert origin.request_count() == 1


@pytest.mark.fault(28)
@needs_root
def test_another_users_link_is_refused(origin, checkpoint, tmp_path):
    """In a directory that all may write to, it may lead to a file that only we can read, or the planter can change."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with public_directory(0o1777) as cache:
        (cache / "planted").write_bytes(checkpoint.path.read_bytes())
        link = cache / checkpoint.name
        link.symlink_to(cache / "planted")
        os.chown(link, BOB, BOB, follow_symlinks=False)
        errors = [error_in(result) for result in run_ranks(load_as, 2, args=(ALICE, url, cache))]
        expect(errors, rankload.CacheError, f"{link} is another user's symbolic link: refused", "file_name=")
        assert link.is_symlink()
    assert origin.request_count() == 0


@pytest.mark.fault(28)
@needs_root
def test_roots_link_is_not_refused(origin, checkpoint):
    """The administrator's: a directory of weights for all, linked into place."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with public_directory() as cache:
        (cache / "real.pth").write_bytes(checkpoint.path.read_bytes())
        (cache / checkpoint.name).symlink_to("real.pth")
        results = run_ranks(load_as, 2, args=(ALICE, url, cache))
        assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1
