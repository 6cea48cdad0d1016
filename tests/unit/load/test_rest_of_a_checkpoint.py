"""`report.remainder` in one process: which keys are the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from harness.alike import assert_alike
from rankload import ArgumentError, adapt, dist_load_into


def load(tmp_path: Path, content: dict[str, Any], **keywords: Any) -> Any:
    torch.save(content, tmp_path / "file.pth")
    module = nn.Linear(3, 2)
    return dist_load_into((module, torch.optim.AdamW(module.parameters())), tmp_path / "file.pth", **keywords).remainder


def state() -> tuple[Any, Any]:
    module = nn.Linear(3, 2)
    return module.state_dict(), torch.optim.AdamW(module.parameters()).state_dict()


REST = {"epoch": 3, "nested": {"model": {"name": "x"}}}


@pytest.mark.parametrize("model", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("optimizer", ["optimizer", "optimizer_states"])
def test_usual_names(tmp_path: Path, model: str, optimizer: str) -> None:
    weights, states = state()
    content = {model: weights, optimizer: [states] if optimizer == "optimizer_states" else states, **REST}
    assert_alike(load(tmp_path, content), REST)


def test_names_that_an_adapter_changes(tmp_path: Path) -> None:
    weights, states = state()
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    content = {"net": wrapped, "optimizer": states, **REST}
    adapters = [adapt.unwrap("net"), adapt.strip_prefix("module."), adapt.to_dtype(torch.float64)]
    assert_alike(load(tmp_path, content, adapt=adapters), REST)


def test_a_function_of_the_callers_own(tmp_path: Path) -> None:
    weights, states = state()
    found = load(tmp_path, {"net": weights, "optimizer": states, **REST}, adapt=lambda whole: dict(whole["net"]))
    assert_alike(found, REST)


def test_a_copy_of_the_model_stays(tmp_path: Path) -> None:
    """An average that has not begun is the model's own state dict."""
    weights, states = state()
    found = load(tmp_path, {"model": weights, "ema": weights, "optimizer": states})
    assert list(found) == ["ema"] and torch.equal(found["ema"]["weight"], weights["weight"])


def test_it_is_the_processs_own(tmp_path: Path) -> None:
    weights, states = state()
    content = {"model": weights, "optimizer": states, "rng": torch.arange(4)}
    found = load(tmp_path, content)
    (tmp_path / "file.pth").write_bytes(bytes((tmp_path / "file.pth").stat().st_size))
    assert found["rng"].tolist() == [0, 1, 2, 3]


def test_legacy_files(tmp_path: Path) -> None:
    from collections import Counter

    weights, states = state()
    content = {"model": weights, "optimizer": states, "counts": Counter("ab"), "set": {1}, "rng": torch.arange(4)}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    module = nn.Linear(3, 2)
    report = dist_load_into((module, torch.optim.AdamW(module.parameters())), tmp_path / "file.pth")
    assert_alike(report.remainder, {"counts": Counter("ab"), "set": {1}, "rng": torch.arange(4)})


def test_of_a_module_alone_there_is_none(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "file.pth")
    with pytest.raises(ArgumentError, match=r"\(module, optimizer\)"):
        _ = dist_load_into(nn.Linear(3, 2), tmp_path / "file.pth").remainder


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_a_shape(tmp_path: Path) -> None:
    weights, states = state()
    rest = {
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "lazy": nn.LazyLinear(2).state_dict(),
        "meta": torch.ones(2, device="meta"),
    }
    found = load(tmp_path, {"model": weights, "optimizer": states, **rest}, weights_only=False)
    assert list(found) == list(rest) and found["meta"].is_meta and is_lazy(found["lazy"]["weight"])
    assert [part.tolist() for part in found["nested"].unbind()] == [[1, 1], [1, 1, 1]]
