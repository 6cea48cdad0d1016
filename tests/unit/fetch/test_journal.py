"""The journal of a partial file: what is read back after whatever has happened to it."""

from __future__ import annotations

import json
import os

import pytest

from rankload._fetch.partials import journal as journal_module
from rankload._fetch.partials.journal import Journal, PartialContent, journal_path, partial_path_of, read_journal

CONTENT = PartialContent("key", 1000, '"etag"', "Wed, 21 Oct 2015 07:28:00 GMT", None)


@pytest.fixture
def partial_path(tmp_path):
    return tmp_path / "file.bin.0123abcd-0-0-0123abcd.partial"


def written(partial_path, *events, spans=()):
    journal = Journal(partial_path, CONTENT, spans)
    for event in events:
        journal.synced(event) if isinstance(event, int) else journal.add(*event)
    journal.close()
    return journal


def on_another_boot(monkeypatch):
    monkeypatch.setattr(journal_module, "boot_id", lambda: "another")


def test_what_was_noted_is_read(partial_path):
    written(partial_path, (0, 100), (300, 400), (100, 200))
    entries = read_journal(partial_path)
    assert entries.content == CONTENT
    assert list(entries.spans) == [(0, 200), (300, 400)]
    assert entries.modified_at == journal_path(partial_path).stat().st_mtime


def test_begins_with_what_was_adopted(partial_path):
    journal = written(partial_path, (500, 600), spans=[(0, 100)])
    assert journal.count == 2
    assert list(read_journal(partial_path).spans) == [(0, 100), (500, 600)]


def test_after_a_crash_only_what_was_synced_counts(partial_path, monkeypatch):
    written(partial_path, (0, 100), 1, (100, 200), (200, 300), 2, (300, 400))
    assert read_journal(partial_path).spans.total_bytes == 400
    on_another_boot(monkeypatch)
    assert list(read_journal(partial_path).spans) == [(0, 200)]


def test_nothing_was_synced_before_the_crash(partial_path, monkeypatch):
    written(partial_path, (0, 100))
    on_another_boot(monkeypatch)
    assert read_journal(partial_path).spans.total_bytes == 0


def test_where_no_boot_is_known_none_is_the_same(partial_path, monkeypatch):
    monkeypatch.setattr(journal_module, "boot_id", lambda: "")
    written(partial_path, (0, 100), 1, (100, 200))
    assert list(read_journal(partial_path).spans) == [(0, 100)]


@pytest.mark.parametrize("length", range(1, 10))
def test_last_line_that_was_cut_off(partial_path, length):
    written(partial_path, (0, 100), (100, 200))
    text = journal_path(partial_path).read_bytes()
    journal_path(partial_path).write_bytes(text[:-length])
    assert list(read_journal(partial_path).spans) == [(0, 100)]


@pytest.mark.parametrize(
    "line",
    [b"\n", b"nonsense\n", b'"text"\n', b"[1]\n", b"[1, 2, 3]\n", b'[0, "100"]\n', b"[0.5, 9]\n", b"{}\n", b"null\n",
     b'{"synced": "many"}\n', b'{"synced": -1}\n', b"\xff\xfe\n",
     pytest.param(b"\0" * 4096, id="zeros"), pytest.param(b"[" * 100_000 + b"\n", id="deep")],
)  # fmt: skip
def test_reading_ends_at_a_line_of_nonsense(partial_path, line):
    """As a crash leaves it: a block of zeros, half of something else."""
    written(partial_path, (0, 100))
    with journal_path(partial_path).open("ab") as file:
        file.write(line + b"[100, 200]\n")
    assert list(read_journal(partial_path).spans) == [(0, 100)]


@pytest.mark.parametrize("bad", [[-5, 10], [10, 10], [10, 5], [900, 1001], [2**70, 2**71]])
def test_range_that_cannot_be_is_left_out(partial_path, bad):
    written(partial_path, (0, 100), bad, (200, 300))
    assert list(read_journal(partial_path).spans) == [(0, 100), (200, 300)]


@pytest.mark.parametrize(
    "head",
    ["", "\n", "{}\n", "[]\n", "null\n", "nonsense\n", pytest.param("[" * 100_000 + "\n", id="deep"),
     '{"journal": 2, "boot": ""}\n', '{"journal": 1, "boot": ""}\n'],
)  # fmt: skip
def test_head_that_is_none(partial_path, head):
    journal_path(partial_path).write_text(head + "[0, 100]\n")
    assert read_journal(partial_path) is None


@pytest.mark.parametrize("field", ["url_key", "size_bytes", "etag", "last_modified", "sha256", "boot", "journal"])
@pytest.mark.parametrize("value", [1.5, [], {}, True])
def test_field_of_another_type(partial_path, field, value):
    written(partial_path, (0, 100))
    first, _, rest = journal_path(partial_path).read_text().partition("\n")
    journal_path(partial_path).write_text(json.dumps(json.loads(first) | {field: value}) + "\n" + rest)
    entries = read_journal(partial_path)
    # 1 and True are equal; a boot that is nonsense is another one: nothing was synced
    assert entries is None or (field, value) == ("journal", True) or entries.spans.total_bytes == 0


def test_field_of_another_version(partial_path):
    written(partial_path, (0, 100))
    first, _, rest = journal_path(partial_path).read_text().partition("\n")
    journal_path(partial_path).write_text(json.dumps(json.loads(first) | {"later": 1}) + "\n" + rest)
    assert read_journal(partial_path) is None


def test_no_journal(partial_path):
    assert read_journal(partial_path) is None


def test_link_is_not_followed(partial_path, tmp_path):
    written(partial_path, (0, 100))
    journal_path(partial_path).rename(tmp_path / "real")
    journal_path(partial_path).symlink_to(tmp_path / "real")
    assert read_journal(partial_path) is None


def test_pipe_is_not_waited_for(partial_path):
    os.mkfifo(journal_path(partial_path))
    assert read_journal(partial_path) is None


def test_link_in_its_place_is_replaced_and_not_written_through(partial_path, tmp_path):
    (tmp_path / "victim").write_text("precious")
    journal_path(partial_path).symlink_to(tmp_path / "victim")
    written(partial_path, (0, 100))
    assert (tmp_path / "victim").read_text() == "precious"
    assert read_journal(partial_path).spans.total_bytes == 100


def test_link_in_the_place_of_its_beginning_is_refused(partial_path, tmp_path):
    """Then there is no journal; the download goes on."""
    (tmp_path / "victim").write_text("precious")
    beginning = journal_path(partial_path).with_name(journal_path(partial_path).name + ".new")
    beginning.symlink_to(tmp_path / "victim")
    written(partial_path, (0, 100), 1)
    assert (tmp_path / "victim").read_text() == "precious"
    assert read_journal(partial_path) is None


def test_directory_that_is_gone_costs_nothing(tmp_path):
    written(tmp_path / "gone" / "x.partial", (0, 100), 1)


def test_after_the_end_nothing_is_noted(partial_path):
    journal = written(partial_path, (0, 100))
    journal.add(100, 200)
    journal.close()
    assert read_journal(partial_path).spans.total_bytes == 100


def test_path_of_the_partial_file(partial_path):
    journal = journal_path(partial_path)
    assert partial_path_of(journal) == partial_path
    assert partial_path_of(journal.with_name(journal.name + ".new")) == partial_path
    assert partial_path_of(partial_path) is None
    assert partial_path_of(partial_path.with_name("x.new")) is None


def test_a_keeper_that_comes_late_finds_it_closed(tmp_path):
    """Its thread would end with a traceback on stderr."""
    path = tmp_path / "file.partial"
    journal = Journal(path, PartialContent("key", 1000, '"1"', None, None))
    journal.add(0, 10)
    journal.close()
    journal.close()
    journal.add(10, 20)
    journal.synced(2)
    assert journal.count == 1
    assert list(read_journal(path).spans) == [(0, 10)]
