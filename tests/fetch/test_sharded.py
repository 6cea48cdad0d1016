"""Checkpoints in several files, by the URL of their index: fetched as one unit, loaded as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rankload
from harness import mounts
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks
from harness.replies import Reply

INDEX = "model.safetensors.index.json"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A linear layer in two files, its tensors in another order than the files."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    content = dict(nn.Linear(30, 40).state_dict())
    save_file({"weight": content["weight"]}, folder / PARTS[1])
    save_file({"bias": content["bias"]}, folder / PARTS[0])
    weight_map = {"weight": PARTS[1], "bias": PARTS[0]}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 4960}, "weight_map": weight_map}))
    return content


def publish(origin: Origin, folder: Path, repository: str = "repo", **behaviour: Any) -> str:
    for name in PARTS:
        origin.add(f"{repository}/{name}", folder / name, **behaviour)
    return origin.add(f"{repository}/{INDEX}", folder / INDEX, **behaviour)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, torch.Tensor]:
    return write(tmp_path / "files")


@pytest.fixture
def url(origin: Origin, tmp_path: Path, content: dict[str, torch.Tensor]) -> str:
    return publish(origin, tmp_path / "files")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [*found] == [*expected] and all(torch.equal(found[name], expected[name]) for name in expected)


def load_both_ways(rank: int, url: str, cache: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    loaded = rankload.dist_load_state_dict_from_url(url, cache)
    module = nn.Linear(30, 40)
    rankload.dist_load_into(module, url, cache)
    return loaded, module.state_dict()


def test_all_files_are_fetched_once_for_all_ranks(
    origin: Origin, url: str, content: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for result in run_ranks(load_both_ways, 3, args=(url, str(tmp_path / "cache"))):
        for found in result.value:
            assert_equal(found, content)
    assert [origin.request_count(f"repo/{name}") for name in (INDEX, *PARTS)] == [1, 1, 1]


def test_two_of_the_same_names_are_kept_apart(origin: Origin, url: str, content: Any, tmp_path: Path) -> None:
    other = write(tmp_path / "other", seed=1)
    other_url = publish(origin, tmp_path / "other", "another")
    for _ in range(2):
        assert_equal(rankload.dist_load_state_dict_from_url(url, tmp_path / "cache"), content)
        assert_equal(rankload.dist_load_state_dict_from_url(other_url, tmp_path / "cache"), other)
    path = rankload.dist_fetch(url, tmp_path / "cache")
    assert path.name == INDEX and {*path.parent.iterdir()} >= {path.parent / name for name in PARTS}
    assert origin.request_count() == 6


def test_one_file_name_for_two_indexes(origin: Origin, url: str, content: Any, tmp_path: Path) -> None:
    """Each has a folder of its own, whatever the caller calls it."""
    other = write(tmp_path / "other", seed=1)
    other_url = publish(origin, tmp_path / "other", "another")
    for one_url, expected in ((url, content), (other_url, other)):
        for name in (f"mine/{INDEX}", "mine/weights"):
            found = rankload.dist_load_state_dict_from_url(one_url, tmp_path / "cache", file_name=name)
            assert_equal(found, expected)
    path = rankload.dist_fetch(url, tmp_path / "cache", file_name=f"mine/{INDEX}")
    assert path.name == INDEX and path.parent.parent == tmp_path / "cache" / "mine"


@pytest.mark.parametrize(("name", "file_name"), [(INDEX, "b.json"), ("weights.json", f"b.{INDEX}")])
def test_index_of_another_name_does_not_take_anothers_parts(
    origin: Origin, tmp_path: Path, name: str, file_name: str
) -> None:
    write(tmp_path / "other", seed=1)
    content = write(tmp_path / "repo")
    part_of_another = origin.add(f"other/{PARTS[0]}", tmp_path / "other" / PARTS[0])
    publish(origin, tmp_path / "repo")
    url = origin.add(f"repo/{name}", tmp_path / "repo" / INDEX)

    rankload.dist_load_state_dict_from_url(part_of_another, tmp_path / "cache")
    loaded = rankload.dist_load_state_dict_from_url(url, tmp_path / "cache", file_name=file_name)
    assert all(torch.equal(loaded[key], content[key]) for key in content)
    with rankload.open_checkpoint(rankload.dist_fetch(url, tmp_path / "cache", file_name=file_name)) as checkpoint:
        assert checkpoint.entries.keys() == content.keys()


def test_part_that_is_damaged_or_gone_is_fetched_again(
    origin: Origin, url: str, content: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = rankload.dist_fetch(url, tmp_path / "cache").parent
    (folder / PARTS[0]).unlink()
    (folder / PARTS[1]).write_bytes((folder / PARTS[1]).read_bytes()[:-1])
    assert_equal(rankload.dist_load_state_dict_from_url(url, tmp_path / "cache"), content)
    assert [origin.request_count(f"repo/{name}") for name in (INDEX, *PARTS)] == [1, 2, 2]


def test_part_that_the_origin_does_not_have(origin: Origin, url: str, tmp_path: Path) -> None:
    origin.add(f"repo/{PARTS[1]}", b"", Reply(status=404))
    with pytest.raises(rankload.errors.HTTPStatusError, match=PARTS[1]):
        rankload.dist_load_state_dict_from_url(url, tmp_path / "cache")


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": "../file"}}', '{"error": "not found"}', '{"weight_map": {"a": "' + INDEX + '"}}']
)
def test_index_that_is_none(origin: Origin, tmp_path: Path, text: str) -> None:
    url = origin.add(f"repo/{INDEX}", text.encode())
    with pytest.raises(rankload.RankloadError):
        rankload.dist_load_state_dict_from_url(url, tmp_path / "cache")
    assert origin.request_count() == 1


def test_local_ones_are_used_in_place(content: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "files" / INDEX
    assert_equal(rankload.dist_load_state_dict_from_url(path), content)
    assert_equal(rankload.load(path), content)
    rankload.dist_load_into(module := nn.Linear(30, 40), path)
    assert_equal(dict(module.state_dict()), content)
    (tmp_path / "files" / PARTS[0]).unlink()
    with pytest.raises(rankload.CacheError, match=PARTS[0]):
        rankload.dist_load_state_dict_from_url(path)


def receive_both_ways(rank: int, url: str, directory: Path) -> tuple[dict[str, torch.Tensor], list[Any], bool]:
    become_node(min(rank, 1), directory)
    from rankload._load.streams import buckets

    buckets._SMALL_BYTES = (0,)
    cache = directory / f"cache-{rank}"
    loaded = rankload.dist_load_state_dict_from_url(url, cache, delivery="broadcast")
    modules = [nn.Linear(30, 40), nn.Linear(30, 40)]
    rankload.dist_load_into(modules[0], url, cache, delivery="broadcast")
    rankload.dist_load_into(modules[1], url, cache, delivery="broadcast", adapt=lambda content: {**content})
    return loaded, [module.state_dict() for module in modules], cache.exists()


@pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))
def test_broadcast(origin: Origin, url: str, content: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(receive_both_ways, 3, args=(url, tmp_path))):
        loaded, modules, has_cache = result.value
        assert has_cache == (rank == 0)
        assert_equal(loaded, content)
        for module in modules:
            assert_equal(dict(module), content)
    assert origin.request_count() == 3
