"""Owners of partial files: what the name tells, and who is certainly dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.ranks import wait_until
from rankload._cache.layout import Entry
from rankload._fetch.partials import owner as owner_module
from rankload._fetch.partials.owner import Owner, abandoned_path, own_path, owner_of, partials_of, siblings_of


def here(pid: int, started_at: str) -> Owner:
    return Owner(owner_module._machine(os.getpid()), pid, started_at)


def test_own_path_tells_this_process(tmp_path):
    owner = owner_of(own_path(Entry(tmp_path / "file.bin")))
    assert owner.pid == os.getpid() and owner.is_here and not owner.is_dead


def test_own_paths_differ(tmp_path):
    entry = Entry(tmp_path / "file.bin")
    assert len({own_path(entry) for _ in range(100)}) == 100


def test_abandoned_path_has_no_owner(tmp_path):
    owner = owner_of(abandoned_path(Entry(tmp_path / "file.bin")))
    assert owner.is_here and owner.is_dead


def test_abandoned_on_another_host_has_no_owner_either():
    assert Owner("ffffffff", 0, "0").is_dead


def test_process_of_another_host_is_not_ours_to_judge():
    owner = Owner("ffffffff", 1, "1")
    assert not owner.is_here and not owner.is_dead


def test_process_that_has_ended_and_one_that_has_its_number():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = here(process.pid, owner_module._started_at(process.pid))
        assert not owner.is_dead
        assert here(process.pid, "1").is_dead  # the number belongs to somebody else now
        process.kill()
        wait_until(lambda: owner.is_dead, 10, "a zombie writes no more")
    assert owner.is_dead


def test_process_that_cannot_be_looked_at_is_not_dead(monkeypatch):
    monkeypatch.setattr(owner_module, "_started_at", lambda pid: None)
    assert not here(1, "77").is_dead


@pytest.mark.parametrize(
    "name",
    ["file.bin", "file.bin.partial", "file.bin.1-2-3.partial", "file.bin.0123abcd-1-1-0123abcd.partial.journal",
     "file.bin.0123ABCD-1-1-0123abcd.partial", "file.bin.0123abcd--1-1-0123abcd.partial", "file.bin0123abcd.partial"],
)  # fmt: skip
def test_no_name_of_ours(name):
    assert owner_of(Path(name)) is None


def test_machine_differs_by_host_boot_and_fork(monkeypatch):
    def name() -> str:
        owner_module._machine.cache_clear()
        return owner_module._machine(os.getpid())

    names = {name()}
    monkeypatch.setattr(owner_module, "boot_id", lambda: "another boot")
    names.add(name())
    host = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((host[0], "elsewhere", *host[2:])))
    names.add(name())
    owner_module._machine.cache_clear()
    assert len(names) == 3


def test_partials_of_one_entry(tmp_path):
    entry, longer = Entry(tmp_path / "file.bin"), Entry(tmp_path / "file.bin.old")
    ours = [own_path(entry), abandoned_path(entry)]
    for other in ("other.bin", "file.bin.new", "file.bin.index.json"):
        own_path(Entry(tmp_path / other)).touch()
    for path in ours:
        path.touch()
    entry.path.touch()
    assert sorted(partials_of(entry)) == sorted(ours) == sorted(siblings_of(entry))
    assert partials_of(longer) == []


def test_partials_of_a_directory_that_is_gone(tmp_path):
    assert partials_of(Entry(tmp_path / "gone" / "file.bin")) == []


def test_long_names_are_cut(tmp_path):
    entry = Entry(tmp_path / ("ü" * 120 + ".bin"))
    path, others = own_path(entry), own_path(Entry(tmp_path / ("ü" * 120 + ".txt")))
    path.touch()
    others.touch()
    assert len(path.name.encode()) < 240 and partials_of(entry) == [path]
