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

from benchmarks.models import Model, make
from benchmarks.transformer import parallelize
from harness.rank import mark_and_wait

Kind = Literal["state_dict", "module", "meta", "fsdp", "tensor-parallel"]


@dataclass(frozen=True)
class Files:
    """The same weights in both formats, in rankload's cache, which is their folder: their origin is not asked.

    Attributes:
        zip, url: path and URL of a file of torch.save.
        safetensors, safetensors_url: path and URL of a safetensors file.
        size_bytes, tensor_count: of the weights.
    """

    zip: Path
    url: str
    safetensors: Path
    safetensors_url: str
    size_bytes: int
    tensor_count: int


@dataclass(frozen=True)
class ModuleWay:
    """One way.

    Attributes:
        load: into a module, from files; for ``state_dict`` what it returns is the result, and the module is empty.
        kinds: of modules that it can do.
        needs: modules that it imports, before the clock starts; without one of them it is left out.
    """

    name: str
    load: Callable[[nn.Module, Files], Any]
    kinds: frozenset[Kind]
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


def load_in_rank(rank: int, way: ModuleWay, kind: Kind, model: Model, layers: int, files: Files) -> Measured:
    """Make the module, load once, and check that every tensor has come: all begin as zeros, none is saved so."""
    for name in (
        *way.needs,
        "rankload._api.state_dict",
        "rankload._load.state_dict.read_checkpoint",
        "rankload._api.module",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
    ):
        importlib.import_module(name)
    torch.set_num_threads(1)  # as torchrun does
    dist.init_process_group("gloo")
    module = _module(kind, model, layers)
    mark_and_wait("ready", timeout_seconds=300)
    before, read_before = _peak_bytes(reset=True), _read_bytes()
    dist.barrier()  # or a rank's time would have in it how much later the others begin
    started = time.perf_counter()
    result = way.load(module, files)
    seconds = time.perf_counter() - started
    growth, read = _peak_bytes() - before, _read_bytes() - read_before
    tensors = result.values() if kind == "state_dict" else module.parameters()
    own = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
    has_come = [_has_come(tensor) for tensor in own if tensor.numel()]
    assert all(has_come), f"{way.name} has left {has_come.count(False)} tensors as they were"
    mark_and_wait("touched", timeout_seconds=300)
    dist.barrier()
    dist.destroy_process_group()
    return Measured(seconds, growth, sum(tensor.nbytes for tensor in own), read)


def _has_come(tensor: torch.Tensor) -> bool:
    content = tensor.view(-1).view(torch.uint8)
    return bool((content[::512] if len(content) > 1 << 20 else content).any())


def _module(kind: Kind, model: Model, layers: int) -> nn.Module:
    if kind == "state_dict":
        return nn.Module()
    module = make(model, layers, "meta" if kind == "meta" else "cpu")
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in module.layers:
            fully_shard(layer)
        module = fully_shard(module)
    if kind == "tensor-parallel":
        parallelize(module)
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

    return dist_load_state_dict_from_url(files.url, files.zip.parent)


def _hub_state_dict(module: nn.Module, files: Files) -> Any:
    return torch.hub.load_state_dict_from_url("https://host/" + files.zip.name, str(files.zip.parent), progress=False)


def _mapped_state_dict(module: nn.Module, files: Files) -> Any:
    return torch.load(files.zip, mmap=True, weights_only=True)


def _safetensors_state_dict(module: nn.Module, files: Files) -> Any:
    from safetensors.torch import load_file

    return load_file(files.safetensors)


def _rankload(module: nn.Module, files: Files) -> None:
    from rankload import dist_load_into

    dist_load_into(module, files.url, files.zip.parent)


def _rankload_safetensors(module: nn.Module, files: Files) -> None:
    from rankload import dist_load_into

    dist_load_into(module, files.safetensors_url, files.safetensors.parent)


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


def _fastsafetensors_state_dict(module: nn.Module, files: Files) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [os.fspath(files.safetensors)]})
    buffer = loader.copy_files_to_device()
    return {name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx}


def _fastsafetensors(module: nn.Module, files: Files) -> None:
    module.load_state_dict(_fastsafetensors_state_dict(module, files))


def _runai_state_dict(module: nn.Module, files: Files) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(os.fspath(files.safetensors))
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


def runai(module: nn.Module, files: Files) -> None:
    """Copy each tensor into its place as it comes, on whatever device that is."""
    from runai_model_streamer import SafetensorsStreamer

    own = module.state_dict()
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(os.fspath(files.safetensors))
        for name, tensor in streamer.get_tensors():
            own[name].copy_(tensor)


def _mmengine(module: nn.Module, files: Files) -> None:
    from mmengine.runner import load_checkpoint

    load_checkpoint(module, os.fspath(files.zip), map_location="cpu", logger="silent")


_DCP = ("torch.distributed.checkpoint.state_dict",)
_BOTH: frozenset[Kind] = frozenset({"module", "meta"})
_MODULE: frozenset[Kind] = frozenset({"module"})
_SHARDED: frozenset[Kind] = frozenset({"fsdp", "tensor-parallel"})
_STATE_DICT: frozenset[Kind] = frozenset({"state_dict"})

RANKLOAD = "rankload"
HUB = "torch.hub.load_state_dict_from_url"
TORCH_LOAD = "load_state_dict(torch.load(…))"
MAPPED = "load_state_dict(torch.load(mmap=True))"
DCP = "DCP, broadcast_from_rank0"

_SAFETENSORS = ("safetensors.torch",)
_FAST = ("fastsafetensors",)
_RUNAI = ("runai_model_streamer",)

MODULE_WAYS = (
    ModuleWay(RANKLOAD, _state_dict, _STATE_DICT),
    ModuleWay(HUB, _hub_state_dict, _STATE_DICT),
    ModuleWay("torch.load(mmap=True)", _mapped_state_dict, _STATE_DICT),
    ModuleWay("safetensors load_file", _safetensors_state_dict, _STATE_DICT, _SAFETENSORS),
    ModuleWay("fastsafetensors", _fastsafetensors_state_dict, _STATE_DICT, _FAST),
    ModuleWay("runai-model-streamer", _runai_state_dict, _STATE_DICT, _RUNAI),
    ModuleWay(RANKLOAD, _rankload, _BOTH | _SHARDED),
    ModuleWay("rankload, safetensors", _rankload_safetensors, _BOTH | _SHARDED),
    ModuleWay(MAPPED, _torch_load_mapped, _BOTH),
    ModuleWay(TORCH_LOAD, _torch_load, _MODULE),
    ModuleWay("load_state_dict(safetensors load_file)", _safetensors, _BOTH, _SAFETENSORS),
    ModuleWay("load_state_dict(fastsafetensors)", _fastsafetensors, _MODULE, _FAST),
    ModuleWay("runai-model-streamer, copied", runai, _MODULE, _RUNAI),
    ModuleWay("accelerate.load_checkpoint_in_model", _accelerate, _MODULE, ("accelerate",)),
    ModuleWay("mmengine.load_checkpoint", _mmengine, _MODULE, ("mmengine.runner",)),
    ModuleWay(DCP, _dcp_broadcast, _MODULE | _SHARDED, _DCP),
    ModuleWay("DCP, full_state_dict in every rank", _dcp_in_every_rank, _SHARDED, _DCP),
)
