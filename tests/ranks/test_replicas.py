"""Nodes with directories of their own load one version of the file, or all say that they cannot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_functions import Outcome, load, outcomes, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ranks import run_ranks


def _load_in_own(rank: int, url: str, root: Path, **arguments: Any) -> Outcome:
    return try_to_load(rank, url, str(root / f"node{rank}"), **arguments)


def _outcomes(url: str, root: Path, world_size: int = 3, **arguments: Any) -> list[Outcome]:
    return outcomes(run_ranks(_load_in_own, world_size, args=(url, root), kwargs=arguments))


@pytest.fixture
def versions(tmp_path: Path) -> list[CheckpointFile]:
    """Two versions of one size."""
    files = []
    for number in (1.0, 2.0):
        path = tmp_path / f"version{number:.0f}" / "model.pth"
        path.parent.mkdir()
        content = {"w": torch.full((100, 100), number)}
        torch.save(content, path)
        files.append(CheckpointFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), content))
    assert len({file.path.stat().st_size for file in files}) == 1
    return files


@pytest.mark.fault(77)
@pytest.mark.parametrize("scope", ["auto", "process"])
def test_node_that_has_an_older_version_fetches_rank_0s(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, scope: str
) -> None:
    old, new = versions
    url = origin.add("model.pth", old.path)
    assert load(1, url, str(tmp_path / "node1")) == digest_of(old.content)
    origin.add("model.pth", new.path)
    for _ in range(2):
        ended = _outcomes(url, tmp_path, scope=scope)
        assert [outcome.digest for outcome in ended] == [digest_of(new.content)] * 3, ended
    assert origin.request_count("model.pth") == 4  # the old one, and one for each directory


@pytest.mark.fault(77)
@pytest.mark.parametrize("parts", [False, True])
def test_version_of_rank_0_that_cannot_be_had_any_more_is_one_error_on_all_ranks(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, parts: bool
) -> None:
    old, new = versions
    name = "model.safetensors.index.json" if parts else "model.pth"
    if parts:
        index = tmp_path / name
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "model.pth"}}))
        origin.add(name, index)
    url = origin.url(name)
    origin.add("model.pth", old.path)
    assert load(0, url, str(tmp_path / "node0")) == digest_of(old.content)
    origin.add("model.pth", new.path)
    ended = _outcomes(url, tmp_path)
    assert {outcome.error for outcome in ended} == {"ContentChangedError"}, ended
    for outcome in ended:
        assert "rank 0 has one version of the file" in outcome.text and "SHA-256" in outcome.text
        assert "refresh=True" in outcome.text and "sha256=" in outcome.text
    ended = _outcomes(url, tmp_path, refresh=True)
    assert [outcome.digest for outcome in ended] == [digest_of(new.content)] * 3, ended


@pytest.mark.fault(77)
@pytest.mark.parametrize("is_same", [True, False])
def test_files_that_nobody_has_hashed_are_hashed_for_it(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path, is_same: bool
) -> None:
    """What somebody else has left in rank 0's directory, and what the origin has now."""
    old, new = versions
    url = origin.add("model.pth", (old if is_same else new).path)
    left = tmp_path / "node0" / "model.pth"
    left.parent.mkdir()
    left.write_bytes(old.path.read_bytes())
    offline_first = outcomes(run_ranks(_adopt_offline, 2, args=(url, tmp_path)))
    if is_same:
        assert [outcome.digest for outcome in offline_first] == [digest_of(old.content)] * 2, offline_first
    else:
        assert {outcome.error for outcome in offline_first} == {"ContentChangedError"}, offline_first


def _adopt_offline(rank: int, url: str, root: Path) -> Outcome:
    """Rank 0 cannot ask the origin whose the file is, and takes it with a warning."""
    return try_to_load(rank, url, str(root / f"node{rank}"), offline=rank == 0)


def _adopt_offline_into_a_module(rank: int, url: str, root: Path) -> float:
    from rankload import dist_load_into

    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(100, 100))
    dist_load_into(module, url, root / f"node{rank}", offline=rank == 0)
    return float(module.w.detach()[0, 0])


@pytest.mark.fault(77)
def test_rank_0_hashes_its_file_for_others_while_it_waits_for_them_to_check_theirs(
    origin: Origin, versions: list[CheckpointFile], tmp_path: Path
) -> None:
    url = origin.add("model.pth", versions[0].path)
    left = tmp_path / "node0" / "model.pth"
    left.parent.mkdir()
    left.write_bytes(versions[0].path.read_bytes())
    results = run_ranks(_adopt_offline_into_a_module, 2, args=(url, tmp_path))
    assert [result.value for result in results] == [1.0, 1.0]
