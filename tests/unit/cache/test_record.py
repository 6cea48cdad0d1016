"""The sidecar record."""

import os

import pytest

from rankload._cache.record import Record, find_record, write_record

RECORD = Record("http://host/m.pth", "ab" * 32, 100, 2**62, 7, '"etag"', "cd" * 32, "sha256", "download")


def test_round_trip(tmp_path):
    path = tmp_path / ".rankload" / "m.pth.json"
    write_record(path, RECORD)
    assert find_record(path).record == RECORD
    assert os.listdir(path.parent) == ["m.pth.json"]


def test_absent(tmp_path):
    assert find_record(tmp_path / "none.json") is None


def test_field_of_a_later_version_is_ignored(tmp_path):
    path = tmp_path / "r.json"
    write_record(path, RECORD)
    path.write_text(path.read_text().replace("{", '{"colour": "blue",', 1))
    assert find_record(path).record == RECORD


def test_failure_to_write_leaves_nothing(tmp_path):
    (tmp_path / "r.json").mkdir()
    (tmp_path / "r.json" / "full").touch()
    with pytest.raises(OSError, match="directory"):
        write_record(tmp_path / "r.json", RECORD)
    assert os.listdir(tmp_path) == ["r.json"]


def test_record_that_is_nested_too_deep(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("[" * 100_000)
    found = find_record(path)
    assert found.record is None and "unreadable" in found.problem
