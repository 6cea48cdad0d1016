"""Going on with what a dead download has left: which file, which bytes, and what is cleared away."""

from __future__ import annotations

import os
import time

import pytest

from harness.fetch_calls import files_in
from rankload._cache.layout import Entry
from rankload._fetch.partials import journal
from rankload._fetch.partials import resume as adoption
from rankload._fetch.partials.journal import Journal, PartialContent, journal_path
from rankload._fetch.partials.owner import abandoned_path
from rankload._fetch.partials.partial import Partial
from rankload._fetch.partials.resume import adopt_into, progress_of_partials, remove_dead_partials
from rankload._settings import Settings

SETTINGS = Settings(chunk_bytes=100, lease_seconds=30.0)
SIZE = 1000
OURS = os.urandom(SIZE)


@pytest.fixture
def entry(tmp_path):
    return Entry(tmp_path / "file.bin")


def foreign_path(entry, number=1):
    return entry.path.with_name(f"{entry.partial_stem}.ffffffff-{number}-77-0123abcd.partial")


def leave(path, spans, *, content=OURS, synced=None, seconds_ago=0.0, **facts):
    """A partial file and its journal, as a process leaves them."""
    fields = {"url_key": "key", "size_bytes": SIZE, "etag": '"e"', "last_modified": None, "sha256": None} | facts
    path.write_bytes(content)
    noted = Journal(path, PartialContent(**fields), spans)
    if synced is not None:
        noted.synced(synced)
    noted.close()
    for file in (path, journal_path(path)):
        os.utime(file, (time.time() - seconds_ago,) * 2)
    return path


def adopted(entry, url_keys=("key",), sha256=None, settings=SETTINGS):
    """Adopts; returns the ranges, the bytes in them, and how the counts of copied bytes went."""
    counts = []
    with Partial(entry, settings, sha256, may_be_left=False) as partial:
        adopt_into(partial, entry, frozenset(url_keys), sha256, settings, counts.append)
        spans = list(partial.spans)
        return spans, [os.pread(partial.descriptor, end - begin, begin) for begin, end in spans], counts


def test_abandoned_file_is_renamed(entry):
    path = leave(abandoned_path(entry), [(0, 300), (500, 600)])
    assert adopted(entry) == ([(0, 300), (500, 600)], [OURS[:300], OURS[500:600]], [])
    assert not path.exists() and not journal_path(path).exists()


def test_the_one_with_most_bytes_is_taken(entry):
    small, big = leave(abandoned_path(entry), [(0, 100)]), leave(abandoned_path(entry), [(0, 900)])
    assert adopted(entry)[0] == [(0, 900)]
    assert small.exists() and not big.exists()


@pytest.mark.parametrize(
    ("facts", "url_keys", "sha256", "fits"),
    [
        ({}, ["key"], None, True),
        ({}, ["other"], None, False),
        ({}, ["other", "key"], None, True),
        ({"etag": None}, ["key"], None, False),  # nothing tells two versions apart
        ({"etag": None, "last_modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, ["key"], None, True),
        ({"etag": None}, ["key"], "a" * 64, True),  # the digest will
        ({"sha256": "a" * 64}, ["other"], "a" * 64, True),  # the same content from another mirror
        ({"sha256": "a" * 64}, ["key"], "b" * 64, False),
        ({"sha256": "a" * 64}, ["key"], None, True),
        ({"sha256": "a" * 8}, ["other"], "a" * 8, False),  # a prefix stands in the name, whoever serves the file
        ({"sha256": "a" * 8}, ["key"], "a" * 8, True),
    ],
)
def test_content_must_be_the_same(entry, facts, url_keys, sha256, fits):
    leave(abandoned_path(entry), [(0, 300)], **facts)
    assert adopted(entry, url_keys, sha256)[0] == ([(0, 300)] if fits else [])


def test_silent_file_of_another_host_is_copied(entry):
    path = leave(foreign_path(entry), [(0, 300), (500, 600)], seconds_ago=21)
    spans, found, counts = adopted(entry)
    assert spans == [(0, 300), (500, 600)] and found == [OURS[:300], OURS[500:600]]
    assert counts == [300, 400]
    assert path.read_bytes() == OURS  # its owner may be frozen, not dead


def test_only_synced_bytes_of_another_boot_are_copied(entry, monkeypatch):
    leave(foreign_path(entry), [(0, 300), (500, 600)], synced=1, seconds_ago=21)
    monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
    assert adopted(entry)[0] == [(0, 300)]


def test_file_of_another_host_that_is_written_to_is_left_alone(entry):
    path = leave(foreign_path(entry), [(0, 300)], seconds_ago=19)
    assert adopted(entry)[0] == []
    remove_dead_partials(entry, SETTINGS, time.time())
    assert path.exists()


def test_file_that_is_copied_without_the_kernels_help(entry, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    leave(foreign_path(entry), [(0, 300), (500, 600)], seconds_ago=21)
    assert adopted(entry)[1] == [OURS[:300], OURS[500:600]]


@pytest.mark.parametrize("place", [abandoned_path, foreign_path])
def test_file_that_is_shorter_than_its_journal_says(entry, place):
    leave(place(entry), [(0, 300), (500, 600)], content=OURS[:550], seconds_ago=21)
    assert adopted(entry)[0] == []


@pytest.mark.parametrize("place", [abandoned_path, foreign_path])
def test_next_best_is_taken_where_the_best_cannot_be(entry, place, tmp_path):
    bad = leave(place(entry), [(0, 900)], seconds_ago=21)
    bad.unlink()
    bad.symlink_to(tmp_path / "victim")
    leave(abandoned_path(entry), [(0, 100)])
    assert adopted(entry)[0] == [(0, 100)]
    assert not (tmp_path / "victim").exists()


def test_file_with_a_second_name_is_not_taken(entry, tmp_path):
    path = leave(abandoned_path(entry), [(0, 300)])
    os.link(path, tmp_path / "second")
    assert adopted(entry)[0] == []
    assert path.read_bytes() == (tmp_path / "second").read_bytes() == OURS


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_file_of_another_user_is_not_taken(entry):
    os.chown(leave(abandoned_path(entry), [(0, 300)]), 71001, -1)
    assert adopted(entry)[0] == []


def test_file_without_a_journal_is_not_taken_but_removed(entry):
    path = abandoned_path(entry)
    path.write_bytes(OURS)
    assert adopted(entry)[0] == []
    remove_dead_partials(entry, SETTINGS, time.time())
    assert not path.exists()


def test_journal_without_a_partial_file_is_removed(entry):
    """Its process was killed between two renames, or right after it had published."""
    paths = [leave(place(entry), [(0, 300)], seconds_ago=21) for place in (abandoned_path, foreign_path)]
    for path in paths:
        path.unlink()
    beginning = journal_path(abandoned_path(entry))
    beginning.with_name(beginning.name + ".new").touch()
    remove_dead_partials(entry, SETTINGS, time.time())
    assert files_in(entry.path.parent) == []


def test_journal_of_a_living_owner_is_kept(entry):
    """Another host may be about to make its partial file's name known here."""
    path = leave(foreign_path(entry), [(0, 300)], seconds_ago=19)
    path.unlink()
    with Partial(entry, SETTINGS) as partial:
        Journal(partial.path, PartialContent("key", SIZE, None, None, None)).close()
        partial.path.rename(entry.path.with_name("moved"))
        remove_dead_partials(entry, SETTINGS, time.time())
        assert journal_path(partial.path).exists() and journal_path(path).exists()


def test_journal_of_another_entry_is_kept(entry):
    path = leave(abandoned_path(Entry(entry.path.with_name("other.bin"))), [(0, 300)])
    path.unlink()
    remove_dead_partials(entry, SETTINGS, time.time())
    assert journal_path(path).exists()


def test_progress_mark_changes_while_somebody_writes(entry):
    assert progress_of_partials(entry) == ()
    path = leave(foreign_path(entry), [(0, 300)])
    mark = progress_of_partials(entry)
    assert mark == progress_of_partials(entry)
    with path.open("ab") as file:
        file.write(b"more")
    assert progress_of_partials(entry) != mark


def test_directory_that_cannot_be_listed(entry, monkeypatch):
    monkeypatch.setattr(adoption, "partials_of", lambda entry: [foreign_path(entry)])  # gone since the listing
    assert adopted(entry)[0] == [] and progress_of_partials(entry) == ()
    remove_dead_partials(entry, SETTINGS, time.time())


@pytest.mark.parametrize(("seconds_ago", "content", "is_kept"), [(19, b"", True), (21, b"", False), (21, b"x", True)])
def test_empty_file_of_another_host_without_a_journal(entry, seconds_ago, content, is_kept):
    """Its owner was killed before the origin had answered."""
    path = foreign_path(entry)
    path.write_bytes(content)
    os.utime(path, (time.time() - seconds_ago,) * 2)
    remove_dead_partials(entry, SETTINGS, time.time())
    assert path.exists() == is_kept
