"""The official hooks of other libraries, filled in by rankload.integrations."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness.origin import Origin
from harness.ranks import run_ranks


@pytest.fixture
def url(origin: Origin) -> str:
    torch.save({"state_dict": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}}, file := io.BytesIO())
    return origin.add("last.ckpt", file.getvalue())


def load_by_mmengine(rank: int, url: str, model_dir: str) -> list[float]:
    from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint

    from rankload.integrations import mmengine

    dist.init_process_group("gloo")
    schemes = dict(CheckpointLoader._schemes)
    mmengine.register(model_dir=model_dir)
    try:
        model = nn.Linear(3, 2)
        load_checkpoint(model, url, map_location="cpu", strict=True)
    finally:
        CheckpointLoader._schemes = schemes
        dist.destroy_process_group()
    return model.weight.flatten().tolist()


def test_mmengine_scheme(origin: Origin, url: str, tmp_path: Path) -> None:
    results = run_ranks(load_by_mmengine, 3, args=(url, str(tmp_path)))
    assert [result.value for result in results] == [[0, 1, 2, 3, 4, 5]] * 3
    assert origin.request_count() == 1


def read_by_iopath(rank: int, url: str, model_dir: str) -> tuple[str, bytes, bool, bool]:
    from iopath.common.file_io import PathManager

    from rankload.integrations.iopath import register

    manager = PathManager()
    register(manager, model_dir)
    with manager.open(url, "rb") as file:
        content = file.read()
    with pytest.raises(ValueError, match="not written") as caught:
        manager.open(f"{url}?token=secret", "w")
    assert "secret" not in str(caught.value)
    return manager.get_local_path(url), content, manager.exists(url), manager.isfile(url.replace("vocabulary", "none"))


def test_iopath_handler(origin: Origin, tmp_path: Path) -> None:
    url = origin.add("vocabulary.txt", b"one\ntwo\n")
    for result in run_ranks(read_by_iopath, 3, args=(url, str(tmp_path))):
        assert result.value == (str(tmp_path / "vocabulary.txt"), b"one\ntwo\n", True, False)
    assert origin.request_count("vocabulary.txt") == 1


def load_by_fabric(rank: int, url: str, model_dir: str, path: str) -> list[list[float]]:
    from lightning_fabric import Fabric

    from rankload.integrations.lightning import RankloadIO

    fabric = Fabric(accelerator="cpu", devices=dist_size(), strategy="ddp", plugins=[RankloadIO(model_dir=model_dir)])
    fabric.launch()
    found = []
    for place in (url, path):
        model = fabric.setup(nn.Linear(3, 2))
        fabric.load(place, {"state_dict": model})
        found.append(model.weight.flatten().tolist())
    fabric.save(path, {"state_dict": model})
    fabric.barrier()
    return found


def dist_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


def test_fabric_plugin(origin: Origin, url: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}}, tmp_path / "own.ckpt")
    environment = {rank: {"TORCHELASTIC_RUN_ID": "1"} for rank in range(2)}
    arguments = (url, str(tmp_path / "cache"), str(tmp_path / "own.ckpt"))
    for result in run_ranks(load_by_fabric, 2, args=arguments, rank_env=environment):
        assert result.value == [[0, 1, 2, 3, 4, 5], [0] * 6]
    assert origin.request_count() == 1


def read_by_fsspec(rank: int, url: str, model_dir: str) -> tuple[bytes, str, int, bool]:
    import fsspec

    with fsspec.open(f"rankload::{url}", "rb", rankload={"model_dir": model_dir}) as file:
        content = file.read()
    path = fsspec.open_local(f"rankload::{url}", rankload={"model_dir": model_dir})
    filesystem, name = fsspec.core.url_to_fs(f"rankload::{url}", model_dir=model_dir)
    missing, missing_name = fsspec.core.url_to_fs(f"rankload::{url}.none", model_dir=model_dir)
    with pytest.raises(ValueError, match="not written") as caught:
        fsspec.open(f"rankload::{url}?token=secret", "wb", rankload={"model_dir": model_dir}).open()
    assert "secret" not in str(caught.value)
    return content, path, filesystem.size(name), missing.exists(missing_name)


def test_fsspec_filesystem(origin: Origin, tmp_path: Path) -> None:
    url = origin.add("vocabulary.txt", b"a\nb\n")
    cached = str(tmp_path / "vocabulary.txt")
    for result in run_ranks(read_by_fsspec, 3, args=(url, str(tmp_path))):
        assert result.value == (b"a\nb\n", cached, 4, False)
    assert origin.request_count("vocabulary.txt") == 1
