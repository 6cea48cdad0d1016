"""`report.remainder`: what a training checkpoint holds besides the model and the optimizer, on every rank."""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import mounts
from harness.alike import assert_alike
from harness.nodes import become_node
from harness.ranks import run_ranks


def small() -> dict[str, Any]:
    return {
        "epoch": 3,
        "shape": torch.Size([2, 3]),
        "scheduler": OrderedDict(milestones=Counter([30, 60]), dtype=torch.float16, last=[0.1, (2, None)]),
        "rng": {"torch": torch.get_rng_state(), "cuda": [torch.arange(16, dtype=torch.uint8)], "numbers": {1, 2}},
    }


def large() -> dict[str, Any]:
    base = torch.arange(100_000.0)
    return {**small(), "ema": OrderedDict(weight=nn.Parameter(base), view=base[10:20], again=base)}


def objects() -> dict[str, Any]:
    """Tensors that only torch.load builds."""
    return {
        **small(),
        "sparse": torch.eye(4).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }


CONTENTS: dict[str, Callable[[], dict[str, Any]]] = {"small": small, "large": large, "objects": objects}


def saved(directory: Path, rest: dict[str, Any]) -> tuple[Path, nn.Module]:
    torch.manual_seed(3)
    module = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(30)).sum().backward()
    optimizer.step()
    path = directory / "training.pth"
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), **rest}, path)
    return path, module


def _load(rank: int, path: Path, directory: Path, delivery: str) -> Any:
    from rankload import dist_load_into

    if delivery == "broadcast":
        become_node(rank, directory)
    dist.init_process_group("gloo")
    module = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(module.parameters())
    report = dist_load_into((module, optimizer), path, delivery=delivery)
    rest = {} if delivery == "broadcast" and rank else torch.load(path)  # receivers do not have the file
    for key in ("model", "optimizer"):
        rest.pop(key, None)
    if rest:
        assert_alike(report.remainder, rest)
        found, expected = report.remainder.get("ema"), rest.get("ema")
        assert (found is None) == (expected is None)
        if found is not None:
            assert found["view"].untyped_storage().data_ptr() == found["again"].untyped_storage().data_ptr()
    dist.barrier()
    dist.destroy_process_group()
    return module.state_dict(), report.remainder, len(optimizer.state)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("delivery", ["read", "broadcast", "gather"])
def test_every_rank_has_it(tmp_path: Path, delivery: str, content: str) -> None:
    if delivery == "broadcast" and (reason := mounts.why_not()) is not None:
        pytest.skip(str(reason))
    path, module = saved(tmp_path, CONTENTS[content]())
    expected = torch.load(path)
    del expected["model"], expected["optimizer"]
    for result in run_ranks(_load, 2, args=(path, tmp_path, delivery)):
        weights, remainder, states = result.value
        assert torch.equal(weights["weight"], module.weight) and states == 2
        assert_alike(remainder, expected)


def _load_what_is_refused(rank: int, path: Path, weights_only: bool) -> Any:
    from rankload import dist_load_into
    from rankload.errors import UnsafePickleError

    dist.init_process_group("gloo")
    module = nn.Linear(30, 20)
    report = dist_load_into((module, torch.optim.AdamW(module.parameters())), path, weights_only=weights_only)
    try:
        found: Any = report.remainder
    except UnsafePickleError as error:
        found = str(error)
    dist.barrier()
    dist.destroy_process_group()
    return module.state_dict(), found


@pytest.mark.parametrize("weights_only", [True, False])
def test_classes_that_weights_only_refuses(tmp_path: Path, weights_only: bool) -> None:
    """They keep nobody from loading the model: who asks for the remainder is told."""
    path, module = saved(tmp_path, {**small(), "args": argparse.Namespace(lr=0.1)})
    for result in run_ranks(_load_what_is_refused, 2, args=(path, weights_only)):
        weights, remainder = result.value
        assert torch.equal(weights["weight"], module.weight)
        if weights_only:
            assert "add_safe_globals([argparse.Namespace])" in remainder
        else:
            assert remainder["args"] == argparse.Namespace(lr=0.1) and type(remainder["shape"]) is torch.Size
