"""The ways to get weights into a module in every rank, each as a function that a rank runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.transformer import Transformer
from harness.rank import mark_and_wait

Case = Literal["state_dict", "module", "meta", "fsdp"]


@dataclass(frozen=True)
class Files:
    """The same weights in both formats."""

    zip: Path
    safetensors: Path
    size_bytes: int


@dataclass(frozen=True)
class ModuleWay:
    """One way.

    Attributes:
        load: into a module, from files; for ``state_dict`` what it returns is the result, and the module is empty.
        cases: those that it can do.
        needs: modules that it imports, before the clock starts; without one of them it is left out.
    """

    name: str
    load: Callable[[nn.Module, Files], Any]
    cases: frozenset[Case]
    needs: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        """Whether all that it needs is there."""
        return all(importlib.util.find_spec(name.partition(".")[0]) is not None for name in self.needs)


@dataclass(frozen=True)
class Measured:
    """What one rank saw of one load.

    Attributes:
        seconds: of the call.
        growth_bytes: of its resident memory, at the most, during the call.
        shard_bytes: of its own parameters.
        read_bytes: that it asked the system for, by read(2) and its kin (mapped bytes are not counted).
    """

    seconds: float
    growth_bytes: int
    shard_bytes: int
    read_bytes: int


def load_in_rank(rank: int, way: ModuleWay, case: Case, layers: int, files: Files) -> Measured:
    """Make the module, load once, and check that every tensor has come: all begin as zeros, none is saved so."""
    for name in (
        *way.needs,
        "rankload._api",
        "rankload._deliver.read",
        "rankload._load_into",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
    ):
        importlib.import_module(name)
    torch.set_num_threads(1)  # as torchrun does
    dist.init_process_group("gloo")
    module = _module(case, layers)
    dist.barrier()
    mark_and_wait("ready", timeout_seconds=300)
    before, read_before = _peak_bytes(reset=True), _read_bytes()
    started = time.perf_counter()
    result = way.load(module, files)
    seconds = time.perf_counter() - started
    growth, read = _peak_bytes() - before, _read_bytes() - read_before
    tensors = result.values() if case == "state_dict" else module.parameters()
    own = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
    has_come = [bool(tensor.view(torch.uint8).view(-1)[::512].any()) for tensor in own if tensor.numel()]
    assert all(has_come), f"{way.name} has left {has_come.count(False)} tensors as they were"
    mark_and_wait("touched", timeout_seconds=300)
    dist.barrier()
    dist.destroy_process_group()
    return Measured(seconds, growth, sum(tensor.nbytes for tensor in own), read)


def _module(case: Case, layers: int) -> nn.Module:
    if case == "state_dict":
        return nn.Module()
    module: nn.Module = Transformer(layers, "meta" if case == "meta" else "cpu")
    if case == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in module.layers:
            fully_shard(layer)
        module = fully_shard(module)
    return module


def _peak_bytes(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


# --- the ways ---------------------------------------------------------------------------------------------------------


def _state_dict(module: nn.Module, files: Files) -> Any:
    from rankload import dist_load_state_dict_from_url

    return dist_load_state_dict_from_url(files.zip)


def _hub_state_dict(module: nn.Module, files: Files) -> Any:
    return torch.hub.load_state_dict_from_url("https://host/" + files.zip.name, str(files.zip.parent), progress=False)


def _mapped_state_dict(module: nn.Module, files: Files) -> Any:
    return torch.load(files.zip, mmap=True, weights_only=True)


def _safetensors_state_dict(module: nn.Module, files: Files) -> Any:
    from safetensors.torch import load_file

    return load_file(files.safetensors)


def _rankload(module: nn.Module, files: Files) -> None:
    from rankload import dist_load_into

    dist_load_into(module, files.zip)


def _rankload_safetensors(module: nn.Module, files: Files) -> None:
    from rankload import dist_load_into

    dist_load_into(module, files.safetensors)


def _torch_load(module: nn.Module, files: Files) -> None:
    module.load_state_dict(torch.load(files.zip, map_location="cpu", weights_only=True))


def _torch_load_mapped(module: nn.Module, files: Files) -> None:
    is_meta = next(module.parameters()).is_meta
    module.load_state_dict(torch.load(files.zip, mmap=True, weights_only=True), assign=is_meta)


def _safetensors(module: nn.Module, files: Files) -> None:
    from safetensors.torch import load_file

    module.load_state_dict(load_file(files.safetensors), assign=next(module.parameters()).is_meta)


def _dcp_broadcast(module: nn.Module, files: Files) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state_dict = torch.load(files.zip, mmap=True, weights_only=True) if dist.get_rank() == 0 else {}
    set_model_state_dict(module, state_dict, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _dcp_in_every_rank(module: nn.Module, files: Files) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state_dict = torch.load(files.zip, mmap=True, weights_only=True)
    set_model_state_dict(module, state_dict, options=StateDictOptions(full_state_dict=True))


def _accelerate(module: nn.Module, files: Files) -> None:
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(module, os.fspath(files.safetensors))


def _mmengine(module: nn.Module, files: Files) -> None:
    from mmengine.runner import load_checkpoint

    load_checkpoint(module, os.fspath(files.zip), map_location="cpu", logger="silent")


_DCP = ("torch.distributed.checkpoint.state_dict",)
_BOTH: frozenset[Case] = frozenset({"module", "meta"})

_STATE_DICT: frozenset[Case] = frozenset({"state_dict"})

RANKLOAD = "rankload"
HUB = "torch.hub.load_state_dict_from_url"
TORCH_LOAD = "load_state_dict(torch.load(…))"
MAPPED = "load_state_dict(torch.load(mmap=True))"
DCP = "DCP, broadcast_from_rank0"

MODULE_WAYS = (
    ModuleWay(RANKLOAD, _state_dict, _STATE_DICT),
    ModuleWay(HUB, _hub_state_dict, _STATE_DICT),
    ModuleWay("torch.load(mmap=True)", _mapped_state_dict, _STATE_DICT),
    ModuleWay("safetensors load_file", _safetensors_state_dict, _STATE_DICT, ("safetensors.torch",)),
    ModuleWay(RANKLOAD, _rankload, frozenset({"module", "meta", "fsdp"})),
    ModuleWay("rankload, safetensors", _rankload_safetensors, frozenset({"module", "meta", "fsdp"})),
    ModuleWay(MAPPED, _torch_load_mapped, _BOTH),
    ModuleWay(TORCH_LOAD, _torch_load, frozenset({"module"})),
    ModuleWay("load_state_dict(safetensors load_file)", _safetensors, _BOTH, ("safetensors.torch",)),
    ModuleWay("accelerate.load_checkpoint_in_model", _accelerate, frozenset({"module"}), ("accelerate",)),
    ModuleWay("mmengine.load_checkpoint", _mmengine, frozenset({"module"}), ("mmengine.runner",)),
    ModuleWay(DCP, _dcp_broadcast, frozenset({"module", "fsdp"}), _DCP),
    ModuleWay("DCP, full_state_dict in every rank", _dcp_in_every_rank, frozenset({"fsdp"}), _DCP),
)
