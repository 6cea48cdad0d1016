"""``rankload ls``, ``verify``, ``rm`` and ``prune``."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import rankload
from harness.origin import Origin
from rankload._cache.layout import Entry
from rankload._cli import app
from rankload._cli.app import in_shell_words
from rankload._fetch.partials.owner import own_path
from rankload.errors import ArgumentError

DAY = 24 * 3600


def run(*words: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == exit_code, result.output
    return result.output


def names(cache: Path) -> list[str]:
    return [row["name"] for row in json.loads(run("ls", "--model-dir", cache, "--json"))]


@pytest.fixture
def filled(origin: Origin, cache: Path, tmp_path: Path) -> Path:
    """Files used 1, 10 and 100 days ago, a checkpoint in two files, one of torch.hub's, and one of the user's."""
    for days, name in ((1, "new.bin"), (10, "middle.bin"), (100, "old.bin")):
        path = rankload.dist_fetch(origin.add(name, name.encode() * 1000), cache)
        used(path, days)
    weight_map = {}
    for number in (1, 2):
        part = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.ones(10)}, tmp_path / part)
        origin.add(part, tmp_path / part)
        weight_map[f"w{number}"] = part
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    folder = rankload.dist_fetch(origin.add("model.safetensors.index.json", index), cache).parent
    for path in folder.glob("*.*"):
        if path.is_file():
            used(path, 50)
    (cache / "of_torch_hub-0a1b2c3d.pth").write_bytes(b"torch.hub's")
    (cache / "notes.txt").write_bytes(b"the user's")
    return cache


def used(path: Path, days_ago: float) -> None:
    """As if it had been used then; the record follows, which compares times."""
    then = time.time() - days_ago * DAY
    os.utime(path, (then, then))
    record = path.parent / ".rankload" / f"{path.name}.json"
    content = json.loads(record.read_text())
    content["mtime_ns"] = path.stat().st_mtime_ns
    record.write_text(json.dumps(content))


def test_ls(filled: Path, origin: Origin) -> None:
    rows = {row["name"]: row for row in json.loads(run("ls", "--model-dir", filled, "--json"))}
    folder = next(name for name in rows if name.startswith("model.safetensors-"))
    assert sorted(rows) == sorted(["middle.bin", folder, "new.bin", "old.bin"])
    row = rows["old.bin"]
    assert row["sha256"] == hashlib.sha256(b"old.bin" * 1000).hexdigest() and row["size_bytes"] == 7000
    assert row["origin"] == origin.url("old.bin") and row["source"] == "download" and row["in_use"] == ""
    assert 99 < row["days_unused"] < 101
    assert rows[folder]["files"] == 3
    text = run("ls", "--model-dir", filled)
    assert text.splitlines()[0].split() == ["name", "size", "used", "sha256", "vouched", "by", "in", "use", "origin"]
    assert f"{filled}: 4 items, " in text.splitlines()[-1]


def test_ls_counts_what_failed_downloads_have_left(filled: Path) -> None:
    quarantined = filled / ".rankload" / "quarantine" / "bad.bin"
    quarantined.parent.mkdir()
    quarantined.write_bytes(b"bad")
    assert run("ls", "--model-dir", filled).endswith("1 item in quarantine, or left by killed downloads: 3 B\n")
    assert run("prune", "--model-dir", filled, "--older-than", 1000).endswith("1 item, 3 B; --yes removes them\n")


def test_directory_that_does_not_exist(tmp_path: Path) -> None:
    assert "is no directory" in run("ls", "--model-dir", tmp_path / "nowhere")


def test_verify(filled: Path) -> None:
    assert run("verify", "--model-dir", filled).count("ok: ") == 6
    (filled / "old.bin").write_bytes(b"x" * 7000)
    used(filled / "old.bin", 0)
    output = run("verify", "--model-dir", filled, exit_code=1)
    assert f"DAMAGED: {filled / 'old.bin'}" in output and output.count("ok: ") == 5


def test_rm(filled: Path, origin: Origin) -> None:
    run("rm", "old.bin", "--model-dir", filled)
    assert "old.bin" not in names(filled) and not (filled / "old.bin").exists()
    assert not (filled / ".rankload" / "old.bin.json").exists()
    before = origin.request_count("old.bin")
    assert rankload.dist_fetch(origin.url("old.bin"), filled).read_bytes() == b"old.bin" * 1000
    assert origin.request_count("old.bin") == before + 1
    for name in ("notes.txt", "of_torch_hub-0a1b2c3d.pth", "none.bin"):
        assert "not in the cache" in run("rm", name, "--model-dir", filled, exit_code=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_record_of_another_user_exposes_no_file(filled: Path) -> None:
    """Whoever may write to the cache could else name a file of the user's for removal."""
    notes = filled / "notes.txt"
    record = filled / ".rankload" / "notes.txt.json"
    content = json.loads((filled / ".rankload" / "old.bin.json").read_text())
    status = notes.stat()
    content.update(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
    record.write_text(json.dumps(content))
    assert "notes.txt" in names(filled)
    os.chown(record, 12345, -1)
    assert "notes.txt" not in names(filled)
    run("prune", "--keep-latest", "0", "--yes", "--model-dir", filled)
    assert notes.exists()


def test_text_of_another_users_record_is_escaped(filled: Path) -> None:
    """Names, too: whoever may write to a shared directory publishes there."""
    record = filled / ".rankload" / "old.bin.json"
    name = "a\x1b[2J\nremoved all.pth"
    (filled / name).write_bytes(b"")
    status = (filled / name).stat()
    facts = {"size_bytes": 0, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino, "birth_ns": None}
    forged = {**json.loads(record.read_text()), **facts, "url": "http://h/\x1b[2J\nforged", "vouched_by": "\x9b"}
    (filled / ".rankload" / f"{name}.json").write_text(json.dumps(forged))
    shown = run("ls", "--model-dir", filled) + run("verify", "--model-dir", filled, exit_code=1)
    shown += run("prune", "--keep-latest", 0, "--model-dir", filled)
    shown += run("prune", "--keep-latest", 0, "--yes", "--model-dir", filled)
    assert r"a\x1b[2J\nremoved all.pth" in shown and r"http://h/\x1b[2J\nforged" in shown
    assert all(line.isprintable() for line in shown.split("\n"))
    assert not [line for line in shown.splitlines() if line.startswith(("forged", "removed all"))]


def test_rm_of_a_checkpoint_in_several_files(filled: Path) -> None:
    folder = next(name for name in names(filled) if name.startswith("model.safetensors-"))
    run("rm", folder, "--model-dir", filled)
    assert not (filled / folder).exists()


def test_what_is_mapped_or_leased_stays(filled: Path) -> None:
    with (filled / "old.bin").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert "in use (mapped)" in run("rm", "old.bin", "--model-dir", filled, exit_code=1)
        run("prune", "--keep-latest", "0", "--yes", "--model-dir", filled)
        assert names(filled) == ["old.bin"]
        run("rm", "old.bin", "--force", "--model-dir", filled)
        assert mapping[:7] == b"old.bin" and names(filled) == []


def test_leased_file_stays_until_the_lease_is_abandoned(filled: Path) -> None:
    lease = filled / ".rankload" / "old.bin.lease"
    lease.write_text("somebody")
    assert "in use (leased)" in run("rm", "old.bin", "--model-dir", filled, exit_code=1)
    os.utime(lease, (0, 0))
    run("rm", "old.bin", "--model-dir", filled)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--older-than", "60"], ["middle.bin", "model.safetensors", "new.bin"]),
        (["--keep-latest", "2"], ["middle.bin", "new.bin"]),
        (["--max-size", "20kB"], ["middle.bin", "model.safetensors", "new.bin"]),
        (["--keep-latest", "1", "--older-than", "20"], ["middle.bin", "new.bin"]),
        (["--max-size", "1GB"], ["middle.bin", "model.safetensors", "new.bin", "old.bin"]),
        (["--keep-latest", "0"], []),
    ],
)
def test_prune(filled: Path, options: list[str], left: list[str]) -> None:
    before = names(filled)
    assert "--yes removes them" in run("prune", *options, "--model-dir", filled)
    assert names(filled) == before
    run("prune", *options, "--yes", "--model-dir", filled)
    assert [name.partition("-")[0] for name in names(filled)] == left
    assert (filled / "notes.txt").exists() and (filled / "of_torch_hub-0a1b2c3d.pth").exists()


def test_prune_removes_rests_of_the_dead(filled: Path, origin: Origin) -> None:
    quarantined = filled / ".rankload" / "quarantine" / "bad.bin"
    quarantined.parent.mkdir()
    quarantined.write_bytes(b"bad")
    dead = filled / "never_there.bin.c9be96d8-0-0-0badc0de.partial"
    alive = own_path(Entry(filled / "never_there.bin"))
    for path in (dead, alive):
        path.write_bytes(b"half")
        path.with_name(f"{path.name}.journal").write_bytes(b"{}\n")
    assert str(dead) in run("prune", "--max-size", "1TB", "--model-dir", filled)
    run("prune", "--max-size", "1TB", "--yes", "--model-dir", filled)
    assert not quarantined.exists()
    left = {path.name for path in filled.glob("*.partial*")}
    assert left == {alive.name, f"{alive.name}.journal"}
    assert len(names(filled)) == 4


@pytest.mark.parametrize("words", [["prune"], ["prune", "--max-size", "much"]])
def test_prune_asks_what_to_remove(filled: Path, words: list[str]) -> None:
    run(*words, "--yes", "--model-dir", filled, exit_code=2)
    assert len(names(filled)) == 4


def test_empty_cache(cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    assert json.loads(run("ls", "--model-dir", cache, "--json")) == []
    run("prune", "--keep-latest", "1", "--yes", "--model-dir", cache)


def test_running_job_that_maps_the_cache_goes_on(origin: Origin, cache: Path, checkpoint) -> None:
    """Also where nobody can see its mapping: removing a name takes no page from anybody."""
    url = origin.add(checkpoint.name, checkpoint.path)
    state_dict = rankload.dist_load_state_dict_from_url(url, cache)
    run("rm", checkpoint.name, "--force", "--model-dir", cache)
    expected = torch.load(checkpoint.path)
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("check_hash=True, but 'x': pass sha256=, or", "--check-hash, but 'x': pass --sha256, or"),
        ("or file_name= with it", "or --file-name with it"),
        ("sha256='abc': expected 64 digits", "--sha256 'abc': expected 64 digits"),
        ('headers={"User-Agent": "x"} sends', '--header {"User-Agent": "x"} sends'),
        ("choose another (model_dir=)", "choose another (--model-dir)"),
        ("max_bytes=100 allows", "--max-bytes 100 allows"),
        ("fetch it with dist_fetch, and", "fetch it with rankload prefetch, and"),
        ("my_sha256=3 stays", "my_sha256=3 stays"),
    ],
)
def test_messages_name_options(message: str, shown: str) -> None:
    assert in_shell_words(ArgumentError(message)) == shown
