"""Nodes of one job that differ: in what they share, in what they may write, and in what they have already."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_functions import Outcome, outcomes, try_to_load

from harness import disks, mounts
from harness.checkpoints import CheckpointFile, digest_of
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks

pytestmark = pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))

SCOPES = pytest.mark.parametrize("scope", ["auto", "exchange"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the nodes can share out."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(64 << 10))


@pytest.fixture
def versions(tmp_path: Path) -> list[CheckpointFile]:
    """Two versions of one size."""
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        content = {"w": torch.randn(500, 500)}
        path = tmp_path / f"version{seed}" / "model.pth"
        path.parent.mkdir()
        torch.save(content, path)
        files.append(CheckpointFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), content))
    return files


def load_on_node(rank: int, url: str, dirs: list[Path], root: Path, **arguments: Any) -> Outcome:
    become_node(rank, root)
    return try_to_load(rank, url, str(dirs[rank]), **arguments)


def run(url: str, dirs: list[Path], root: Path, **arguments: Any) -> list[Outcome]:
    """One rank on each node, with a cache directory each."""
    results = run_ranks(load_on_node, len(dirs), nodes=len(dirs), args=(url, dirs, root), kwargs=arguments)
    return outcomes(results)


def fill(url: str, directory: Path, root: Path) -> Path:
    """Let a job of one node fill its cache; return the file."""
    [ended] = run(url, [directory], root)
    assert ended.digest
    return directory / "model.pth"


@pytest.mark.fault(48)
@SCOPES
def test_some_nodes_share_a_directory_and_some_do_not(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, scope: str
) -> None:
    """The first two share one under two names, the last two one that rank 0 does not have."""
    file, _ = versions
    url = origin.add("model.pth", file.path)
    shared, alias, own, rack = (tmp_path / name for name in ("shared", "alias", "own", "rack"))
    shared.mkdir()
    alias.symlink_to(shared)

    ended = run(url, [shared, alias, own, rack, rack], tmp_path, scope=scope)

    assert [outcome.digest for outcome in ended] == [digest_of(file.content)] * 5, ended
    copies = [directory / "model.pth" for directory in (shared, own, rack)]
    assert all(copy.read_bytes() == file.path.read_bytes() for copy in copies)
    served = {"auto": 3, "exchange": 1}[scope]
    questions = 4  # each leader of an exchange asks for a byte
    assert served * file.size <= origin.bytes_sent() <= served * file.size + questions


@pytest.mark.fault(77)
@SCOPES
def test_nodes_that_have_different_things_end_with_the_same(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, scope: str
) -> None:
    """Nothing, the file, a damaged file, an older version, and the file as torch.hub leaves it."""
    old, new = versions
    dirs = [tmp_path / f"node{rank}" for rank in range(5)]
    older = fill(origin.add("model.pth", old.path), dirs[3], tmp_path)
    url = origin.add("model.pth", new.path)
    fill(url, dirs[1], tmp_path)
    os.truncate(fill(url, dirs[2], tmp_path), 1000)
    dirs[4].mkdir()
    (dirs[4] / "model.pth").write_bytes(new.path.read_bytes())
    assert older.read_bytes() == old.path.read_bytes()
    before = origin.bytes_sent()

    ended = run(url, dirs, tmp_path, scope=scope)

    assert [outcome.digest for outcome in ended] == [digest_of(new.content)] * 5, ended
    assert all((directory / "model.pth").read_bytes() == new.path.read_bytes() for directory in dirs)
    # The node with the older version fetches rank 0's for itself, and torch.hub's file is compared by a sample.
    served = {"auto": 3, "exchange": 1}[scope]
    assert served * new.size <= origin.bytes_sent() - before < (served + 0.5) * new.size


@pytest.mark.fault(25)
@SCOPES
def test_node_that_cannot_write_its_directory_ends_the_call_on_all(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, scope: str
) -> None:
    file, _ = versions
    url = origin.add("model.pth", file.path)
    dirs = [tmp_path / f"node{rank}" for rank in range(3)]
    dirs[1].mkdir()

    with disks.read_only(dirs[1]):
        ended = run(url, dirs, tmp_path, scope=scope)

    assert {outcome.error for outcome in ended} == {"CacheError"}, ended
    for outcome in ended:
        assert f"cannot write {dirs[1]}" in outcome.text and "rank 1" in outcome.text and "model_dir=" in outcome.text
    assert max(outcome.ended_at - outcome.started_at for outcome in ended) < 30


@pytest.mark.fault(25)
@SCOPES
def test_node_that_may_only_read_uses_what_it_has(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, scope: str
) -> None:
    file, _ = versions
    url = origin.add("model.pth", file.path)
    dirs = [tmp_path / f"node{rank}" for rank in range(3)]
    fill(url, dirs[1], tmp_path)
    before = origin.bytes_sent()

    with disks.read_only(dirs[1]):
        ended = run(url, dirs, tmp_path, scope=scope)

    assert [outcome.digest for outcome in ended] == [digest_of(file.content)] * 3, ended
    served = {"auto": 2, "exchange": 0}[scope]
    assert served * file.size <= origin.bytes_sent() - before <= served * file.size + 2
