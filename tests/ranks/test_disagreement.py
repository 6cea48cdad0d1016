"""Ranks that make different calls: an error that names both values, on every rank, and at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_functions import Outcome, load, load_when_told, outcomes, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks


def _load_as_told(rank: int, url: str, model_dir: str, own: dict[int, dict[str, Any]]) -> Outcome:
    arguments = {"url": url, "model_dir": model_dir, **own.get(rank, {})}
    return load_when_told(rank, **arguments)


@pytest.mark.parametrize(
    ("argument", "value", "named", "odd"),
    [
        pytest.param("url", "other.pth", "/other.pth", 0, marks=pytest.mark.fault(44)),
        pytest.param("url", "other.pth", "/other.pth", 3, marks=pytest.mark.fault(44)),
        ("sha256", "0" * 64, "0" * 64, 0),
        ("sha256", "0" * 64, "0" * 64, 3),
        ("file_name", "renamed.pth", "renamed.pth", 1),
        ("scope", "node", "'node'", 2),
    ],
)
def test_one_rank_passes_another_value_and_every_rank_names_both(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, argument: str, value: str, named: str, odd: int
) -> None:
    # held: an error of the leader's own download could come before the others have compared, and be the first cause
    url = origin.add(checkpoint.name, checkpoint.path, hold_at=1000)
    usual = {"url": url, "sha256": "None", "file_name": checkpoint.name, "scope": "'auto'"}[argument]
    if argument == "url":
        value = origin.add(value, checkpoint.path, hold_at=1000)
    own = {odd: {argument: value}}
    with start_ranks(_load_as_told, 4, args=(url, cache_dir, own)) as group:
        group.wait_for_mark("ready")
        group.open_gate("ready")
        ended = outcomes(group.wait())
    assert [outcome.error for outcome in ended] == ["ArgumentMismatchError"] * 4
    for outcome in ended:
        assert named in outcome.text and usual in outcome.text, outcome.text
        assert f"rank {odd} has" in outcome.text
    assert max(outcome.ended_at for outcome in ended) - max(outcome.started_at for outcome in ended) < 2


def _load_in_own_order(rank: int, urls: list[str], model_dir: str) -> list[Outcome]:
    order = [1, 0, 0] if rank == 1 else [0, 1, 0]
    return [try_to_load(rank, urls[index], model_dir) for index in order]


@pytest.mark.fault(44)
def test_ranks_in_another_order_of_calls_fail_together_and_can_go_on(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str
) -> None:
    urls = [origin.add(file.name, file.path) for file in (checkpoint, other_checkpoint)]
    results = run_ranks(_load_in_own_order, 3, args=(urls, cache_dir))
    errors = [[outcome.error for outcome in result.value] for result in results]
    assert errors == [["ArgumentMismatchError", "ArgumentMismatchError", None]] * 3
    assert [result.value[2].digest for result in results] == [digest_of(checkpoint.content)] * 3


def _load_own_file(rank: int, location: str, model_dir: str) -> Outcome:
    return try_to_load(rank, location.format(rank=rank), model_dir)


@pytest.mark.fault(86)
@pytest.mark.parametrize("kind", ["local", "query"])
def test_ranks_that_want_a_file_each_hear_what_to_call(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, tmp_path: Path, kind: str
) -> None:
    for rank in range(3):
        shutil.copy(checkpoint.path, tmp_path / f"rank{rank}.pth")
    # held: no rank is to be through with its own before the others have compared
    url = f"{origin.add(checkpoint.name, checkpoint.path, hold_at=1000)}?part=SECRET{{rank}}"
    location = {"local": f"{tmp_path}/rank{{rank}}.pth", "query": url}[kind]
    ended = outcomes(run_ranks(_load_own_file, 3, args=(location, cache_dir)))
    said = {"local": "call rankload.load(path), which", "query": "differs in its query: 'part'"}[kind]
    assert [outcome.error for outcome in ended] == ["ArgumentMismatchError"] * 3
    assert all(said in outcome.text and "SECRET" not in outcome.text for outcome in ended), ended


def _load_with_own_taste(rank: int, url: str, model_dir: str) -> str:
    map_location = ["cpu", None, {"cpu": "cpu"}, lambda storage, tag: storage][rank]
    return load(rank, url, f"{model_dir}-{rank // 2}", map_location=map_location, progress=rank % 2 == 0)


def test_model_dir_map_location_and_progress_may_differ(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_load_with_own_taste, 4, nodes=2, args=(url, cache_dir))
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 4
    assert origin.bytes_sent() <= checkpoint.path.stat().st_size + 2  # and a byte for each node's question
