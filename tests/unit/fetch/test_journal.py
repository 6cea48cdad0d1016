"""The journal after its end."""

from __future__ import annotations

from rankload._fetch.partials.journal import Content, Journal, read_journal


def test_a_keeper_that_comes_late_finds_it_closed(tmp_path):
    """Its thread would end with a traceback on stderr."""
    path = tmp_path / "file.partial"
    journal = Journal(path, Content("key", 1000, '"1"', None, None))
    journal.add(0, 10)
    journal.close()
    journal.close()
    journal.add(10, 20)
    journal.synced(2)
    assert journal.count == 1
    assert list(read_journal(path).spans) == [(0, 10)]
