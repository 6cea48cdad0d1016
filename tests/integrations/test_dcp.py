"""torch.distributed.checkpoint.load through our reader: ordinary checkpoints into sharded state dicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from harness import hf
from harness.origin import Origin
from harness.ranks import run_ranks
from rankload.integrations.dcp import StorageReader

#: Large enough for one shard of it to outweigh the index and torch's own reads.
WIDTH, LAYERS = 512, 8

INDEX = "model.safetensors.index.json"


def make_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def load_shards(rank: int, url: str, model_dir: str | None, prefix: str, style: str) -> tuple[int, int, bool]:
    """The bytes that this rank has read, those of its shards, and whether all elements are right."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo")
    expected = make_model().state_dict()
    model = make_model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if style == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        styles = {str(index): (ColwiseParallel, RowwiseParallel)[index % 2]() for index in range(LAYERS)}
        parallelize_module(model, mesh, styles)
    own = get_model_state_dict(model)
    state_dict: dict[str, Any] = {prefix: own} if prefix else dict(own)
    reader = StorageReader(url, model_dir)
    reader.read_metadata()  # downloads: what follows reads the cache
    import huggingface_hub.hf_api  # noqa: F401  # what only the rank that asks the Hub imports

    dist.barrier()
    reader = StorageReader(url, model_dir)
    before = read_bytes()
    dcp.load(state_dict, storage_reader=reader)
    used = read_bytes() - before
    set_model_state_dict(model, state_dict[prefix] if prefix else state_dict)
    shards = sum(p.to_local().nbytes for p in model.parameters())
    found = {name: value.full_tensor() for name, value in model.state_dict().items()}
    is_right = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    dist.destroy_process_group()
    return used, shards, is_right


def index_and_parts() -> dict[str, bytes]:
    """The model as two safetensors files and their index."""
    state_dict, weight_map, files = make_model().state_dict(), {}, {}
    names = sorted(state_dict)
    for number, part in enumerate((names[: LAYERS // 2], names[LAYERS // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        files[file] = save({name: state_dict[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    return {**files, INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


@pytest.mark.parametrize("style", ["fsdp", "tensor-parallel"])
def test_each_rank_reads_its_shards_of_an_index(origin: Origin, tmp_path: Path, style: str) -> None:
    urls = {name: origin.add(name, content) for name, content in index_and_parts().items()}
    results = run_ranks(load_shards, 4, args=(urls[INDEX], str(tmp_path / "cache"), "", style))
    for result in results:
        used, shards, is_right = result.value
        assert is_right
        if style == "fsdp":  # shards of rows; one of columns is read row by row
            assert used <= 1.02 * shards + (64 << 10), (used, shards)  # the index, and the interpreter's own reads
    assert origin.request_count() == 3


def test_each_rank_reads_its_shards_of_a_repository_on_the_hub(origin: Origin, tmp_path: Path) -> None:
    repository = hf.publish(origin, "org/name", index_and_parts())
    variables = {name: value for name, value in repository.environment.items() if value is not None}
    variables["HF_HOME"] = str(tmp_path)
    results = run_ranks(
        load_shards, 4, args=("hf://org/name", None, "", "fsdp"), rank_env=dict.fromkeys(range(4), variables)
    )
    for result in results:
        used, shards, is_right = result.value
        assert is_right
        assert used <= 1.02 * shards + (64 << 10), (used, shards)
    assert len([request for request in origin.requests() if "/blobs/" in request.path]) == 2


def test_nested_checkpoint_of_torch_save(origin: Origin, tmp_path: Path) -> None:
    torch.save({"model": make_model().state_dict(), "epoch": 3}, tmp_path / "epoch.pth")
    url = origin.add("epoch.pth", tmp_path / "epoch.pth")
    for result in run_ranks(load_shards, 2, args=(url, str(tmp_path / "cache"), "model", "fsdp")):
        assert result.value[2]
    assert origin.request_count() == 1


def test_values_dtypes_and_layouts(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    saved = {
        "weight": weight,
        "transposed": weight.t(),
        "half": weight.half(),
        "scalar": torch.tensor(7),
        "epoch": 3,
        "config": {"name": "x", "size": torch.Size([1, 2])},
    }
    torch.save(saved, tmp_path / "mixed.pth")
    target: dict[str, Any] = {
        "weight": torch.zeros(3, 4),
        "transposed": torch.zeros(4, 3),
        "half": torch.zeros(3, 4),
        "scalar": torch.tensor(0),
        "epoch": 0,
        "config": {"name": "", "size": None},
    }
    dcp.load(target, storage_reader=StorageReader(tmp_path / "mixed.pth"), no_dist=True)
    assert target["epoch"] == 3 and target["config"] == saved["config"]
    for name in ("weight", "transposed", "half", "scalar"):
        assert torch.equal(target[name], saved[name].to(target[name].dtype)), name


def test_reader_serves_again_and_another_checkpoint(tmp_path: Path) -> None:
    for number in range(2):
        torch.save({"weight": torch.full((2,), float(number))}, tmp_path / f"{number}.pth")
    reader, target = StorageReader(tmp_path / "0.pth"), {"weight": torch.full((2,), -1.0)}
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert target["weight"].tolist() == [0, 0]
    dcp.load(target, storage_reader=reader, checkpoint_id=tmp_path / "1.pth", no_dist=True)
    assert target["weight"].tolist() == [1, 1]


def test_name_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: bias"):
        dcp.load({"bias": torch.ones(2)}, storage_reader=StorageReader(tmp_path / "model.pth"), no_dist=True)


def test_file_without_an_index(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointException, match="needs an index"):
        dcp.load({"weight": torch.ones(2)}, storage_reader=StorageReader(tmp_path / "script.pt"), no_dist=True)
