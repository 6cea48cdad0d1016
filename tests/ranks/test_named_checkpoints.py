"""Names in place of URLs, on several ranks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import rankload
from harness import checkpoints
from harness.origin import Origin
from harness.ranks import run_ranks

STATE_DICT = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.fixture
def table(origin: Origin, tmp_path: Path) -> Path:
    saved = {"state_dict": {f"module.{name}": value for name, value in STATE_DICT.items()}}
    file = checkpoints.write_zip(tmp_path, saved, "ddp")
    url, digest = origin.add("ddp.pth", file.path), hashlib.sha256(file.path.read_bytes()).hexdigest()
    path = tmp_path / "rankload.toml"
    path.write_text(
        f'[small]\nurl = ["{origin.url("gone/ddp.pth")}", "{url}"]\nsha256 = "{digest}"\n'
        'adapt = ["unwrap", { strip_prefix = "module." }]\n'
        f'[changed]\nurl = "{url}"\nsha256 = "{"0" * 64}"\n'
    )
    return path


def each_way(rank: int, directory: str, cache: str) -> list[object]:
    """The weights by each call that takes a name."""
    os.chdir(directory)
    found: list[object] = []
    state_dict = rankload.dist_load_state_dict_from_url("small", cache)
    found.append({name: value.tolist() for name, value in state_dict.items()})
    for load in (rankload.dist_load_into, rankload.load_pretrained):
        module = nn.Linear(3, 2)
        load(module, "small", model_dir=cache)
        found.append({name: value.tolist() for name, value in module.state_dict().items()})
    module = nn.Linear(3, 2)
    rankload.load_pretrained(module, "small", table="rankload.toml", model_dir=cache)
    found.append({name: value.tolist() for name, value in module.state_dict().items()})
    found.append(rankload.dist_fetch("small", cache).name)
    return found


def test_every_call_takes_a_name(origin: Origin, table: Path, tmp_path: Path) -> None:
    results = run_ranks(each_way, 3, args=(str(table.parent), str(tmp_path / "cache")))
    expected = {name: value.tolist() for name, value in STATE_DICT.items()}
    for result in results:
        assert result.value == [expected] * 4 + ["ddp.pth"]
    assert origin.completed_count("ddp.pth") == 1


def error_of(rank: int, directory: str, cache: str, name: str, arguments: dict[str, object]) -> str:
    os.chdir(f"{directory}/{rank}" if name == "differs" else directory)
    try:
        rankload.dist_load_state_dict_from_url(name, cache, **arguments)
    except rankload.RankloadError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("changed", {}, "DigestMismatchError: invalid hash value"),
        ("smal", {}, "MissingFileError: .*did you mean small"),
        ("small", {"sha256": "1" * 64}, "ArgumentError: .*another digest for small"),
        ("small", {"adapt": 3}, "ArgumentError: adapt=3"),
    ],
)
def test_errors_are_the_same_on_every_rank(
    table: Path, tmp_path: Path, name: str, arguments: dict[str, object], words: str
) -> None:
    results = run_ranks(error_of, 2, args=(str(table.parent), str(tmp_path / "cache"), name, arguments))
    for result in results:
        assert result.exception is None
        kind, _, text = words.partition(": ")
        assert result.value.startswith(kind), result.value
        assert all(part in result.value for part in text.split(".*")), result.value


def test_tables_that_differ_are_noticed(origin: Origin, tmp_path: Path) -> None:
    url = origin.add("a.pth", checkpoints.write_zip(tmp_path, STATE_DICT, "a").path)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        adapt = '["unwrap"]' if rank else '["unwrap", { drop = "bias" }]'
        text = f'[differs]\nurl = "{url}"\nadapt = {adapt}\n'
        (tmp_path / str(rank) / "rankload.toml").write_text(text)
    for result in run_ranks(error_of, 2, args=(str(tmp_path), str(tmp_path / "cache"), "differs", {})):
        assert "adapt" in result.value and "drop" in result.value, result.value
