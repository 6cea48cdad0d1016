"""Journals without their partial file: what a SIGKILL between two renames leaves."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from rankload._cache.layout import Entry
from rankload._fetch.partials import owner
from rankload._fetch.partials.journal import beginning_path, journal_path
from rankload._fetch.partials.owner import abandoned_path, own_path
from rankload._fetch.partials.resume import remove_dead_partials
from rankload._settings import Settings

DAY = 24 * 3600.0


@pytest.fixture
def entry(tmp_path):
    return Entry(tmp_path / "model.pth")


def of_a_dead_process(entry):
    process = subprocess.Popen(["true"])
    process.wait()
    path = own_path(entry)
    return path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))


def of_another_host(entry):
    path = own_path(entry)
    return path.with_name(path.name.replace(f".{owner._machine(os.getpid())}-", ".0123abcd-"))


def left_after_cleaning(entry, now=None):
    remove_dead_partials(entry, Settings(), now=time.time() if now is None else now)
    return [path.name for path in entry.path.parent.iterdir()]


@pytest.mark.parametrize("name_for", [of_a_dead_process, abandoned_path])
@pytest.mark.parametrize("ending", ["", ".new"])
def test_journal_of_a_dead_owner_is_removed(entry, name_for, ending):
    path = journal_path(name_for(entry))
    path.with_name(path.name + ending).write_text("{}\n")
    assert left_after_cleaning(entry) == []


def test_a_live_owners_is_not(entry):
    path = journal_path(own_path(entry))
    path.write_text("{}\n")
    assert left_after_cleaning(entry) == [path.name]


def test_another_hosts_is_when_it_is_old(entry):
    path = journal_path(of_another_host(entry))
    path.write_text("{}\n")
    assert left_after_cleaning(entry) == [path.name]
    assert left_after_cleaning(entry, time.time() + DAY + 60) == []


def test_other_files_are_nobodys_business(entry):
    names = ["model.pth.journal", "other.pth.0123abcd-1-1-0123abcd.partial.journal", "model.pth.x.partial.journal"]
    for name in names:
        (entry.path.parent / name).touch()
    assert sorted(left_after_cleaning(entry)) == sorted(names)


@pytest.mark.parametrize("name_for", [of_a_dead_process, of_another_host, abandoned_path])
def test_partial_file_whose_owner_was_killed_while_it_began_its_journal(entry, name_for):
    path = name_for(entry)
    path.touch()
    beginning_path(path).touch()
    assert left_after_cleaning(entry, time.time() + Settings().lease_seconds + 60) == []


def test_written_partial_file_without_any_journal_on_another_host_is_left_for_a_day(entry):
    path = of_another_host(entry)
    path.write_bytes(b"x")
    assert left_after_cleaning(entry, time.time() + Settings().lease_seconds + 60) == [path.name]
    assert left_after_cleaning(entry, time.time() + DAY + 60) == []
