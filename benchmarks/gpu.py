"""Weights, warm in the page cache, into modules on an accelerator: the ways that people use, in one run.

As in `benchmarks.modules`: each way in new processes, one load each, what it imports imported before, and the device
initialised. Ranks beyond the number of devices share them, and then have no NCCL. ``state_dict``: nothing but the dict,
on the device. ``module``: into a module that is there. ``meta``: into one on the meta device, which is made during the
call. The floor copies as many bytes out of pinned memory that is full already.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.bounds import Bound
from benchmarks.models import Model, make
from benchmarks.module_ways import MAPPED, RANKLOAD, TORCH_LOAD, Files, Kind, ModuleWay, runai
from benchmarks.modules import write_files
from benchmarks.rounds import interleaved
from benchmarks.table import Table
from harness.rank import mark_and_wait
from harness.ranks import start_ranks

FLOOR = "floor: copies from pinned memory"
_PINNED_BYTES = 64 << 20
_pinned: list[torch.Tensor] = []  # the floor's, made before the clock starts

#: Backends of torch.distributed by device type.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


@dataclass(frozen=True)
class Measured:
    """What one rank saw of one load.

    Attributes:
        seconds: of the call, the device's work included.
        device_bytes: that the call took on the device at its peak, beyond the module's own.
    """

    seconds: float
    device_bytes: int


def gpu(only: Sequence[str] | None, layers: int, world_size: int, rounds: int, scratch: Path) -> Iterator[Table]:
    """Yield the tables, or some of them, by their names."""
    cases: tuple[tuple[str, Model, Kind], ...] = (
        ("gpu-state_dict", "transformer", "state_dict"),
        ("gpu-module", "transformer", "module"),
        ("gpu-meta", "transformer", "meta"),
        ("gpu-many-small-tensors", "resnet", "module"),
    )
    files: dict[Model, Files] = {}
    for slug, model, kind in cases:
        if only is not None and slug not in only:
            continue
        if model not in files:
            files[model] = write_files(scratch, model, layers)
        yield _measured(slug, files[model], model, kind, layers, world_size, rounds)


def _measured(slug: str, files: Files, model: Model, kind: Kind, layers: int, world_size: int, rounds: int) -> Table:
    ways = [way for way in WAYS if kind in way.kinds and way.is_installed]
    results: dict[str, list[list[Measured]]] = defaultdict(list)
    for way in interleaved(ways, rounds):
        with start_ranks(_load_in_rank, world_size, args=(way.name, model, kind, layers, files)) as group:
            group.wait_for_mark("ready", timeout_seconds=300)
            group.open_gate("ready")
            results[way.name].append([result.value for result in group.wait()])
    device = torch.accelerator.current_accelerator()
    return Table(
        slug,
        f"{torch.get_device_module(device).get_device_name()}, {kind}, {world_size} ranks, "
        f"{files.size_bytes / 1e9:.2f} GB in {files.tensor_count} tensors, medians of {rounds}, slowest rank",
        {name: [max(rank.seconds for rank in ranks) for ranks in runs] for name, runs in results.items()},
        {name: _note(runs, files.size_bytes) for name, runs in results.items()},
        (Bound(MAPPED, RANKLOAD), Bound(TORCH_LOAD, RANKLOAD), Bound(ONTO_DEVICE, RANKLOAD), Bound(RANKLOAD, FLOOR)),
    )


def _note(runs: list[list[Measured]], size_bytes: int) -> str:
    rate = statistics.median(size_bytes / max(rank.seconds for rank in ranks) for ranks in runs)
    peak = statistics.median(max(rank.device_bytes for rank in ranks) for ranks in runs)
    return f"{rate / 1e9:.1f} GB/s a rank, device peak + {peak / 1e6:.0f} MB"


def _load_in_rank(rank: int, name: str, model: Model, kind: Kind, layers: int, files: Files) -> Measured:
    way = next(way for way in WAYS if way.name == name and kind in way.kinds)
    for needed in (
        *way.needs,
        "rankload._api.state_dict",
        "rankload._load.state_dict.read_checkpoint",
        "rankload._api.module",
    ):
        importlib.import_module(needed)
    device_type, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    device = torch.device(device_type, rank % count)
    torch.accelerator.set_device_index(device.index)
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(f"cpu:gloo,{device_type}:{_BACKENDS[device_type]}" if world_size <= count else "gloo")
    module = nn.Module() if kind == "state_dict" else make(model, layers, "meta" if kind == "meta" else "cpu")
    if kind == "module":
        module.to(device)
    memory = torch.get_device_module(device)
    dist.all_reduce(torch.ones(1, device=device if world_size <= count else "cpu"))  # connects the ranks
    torch.zeros(1, device=device)
    memory.synchronize()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    if way.name == FLOOR:
        _pinned.append(torch.empty(_PINNED_BYTES, dtype=torch.uint8).fill_(1).pin_memory())
    mark_and_wait("ready", timeout_seconds=300)
    started = time.perf_counter()
    loaded = way.load(module, files)
    memory.synchronize()
    seconds = time.perf_counter() - started
    own_bytes = 0 if kind == "module" or way.name == FLOOR else files.size_bytes
    peak = memory.max_memory_allocated() - before - own_bytes
    if way.name != FLOOR:
        tensors = loaded if kind == "state_dict" else module.state_dict()
        left = [name for name, tensor in tensors.items() if tensor.is_meta or not bool(tensor.any())]
        assert not left, f"{way.name} has left {len(left)} tensors as they were"
    dist.barrier()
    dist.destroy_process_group()
    return Measured(seconds, peak)


# --- the ways ---------------------------------------------------------------------------------------------------------


def _device() -> torch.device:
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


def _into(module: nn.Module, state_dict: dict[str, Any]) -> None:
    module.load_state_dict(state_dict, assign=next(module.parameters()).is_meta)


def _then_into_module(load: Callable[[nn.Module, Files], Any]) -> Callable[[nn.Module, Files], Any]:
    return lambda module, files: _into(module, load(module, files))


def _rankload(file: str) -> Callable[[nn.Module, Files], Any]:
    def load(module: nn.Module, files: Files) -> Any:
        from rankload import dist_load_into

        return dist_load_into(module, getattr(files, file))

    return load


def _floor(module: nn.Module, files: Files) -> None:
    target = torch.empty(_PINNED_BYTES, dtype=torch.uint8, device=_device())
    for begin in range(0, files.size_bytes, _PINNED_BYTES):
        length = min(_PINNED_BYTES, files.size_bytes - begin)
        target[:length].copy_(_pinned[0][:length], non_blocking=True)


def _rankload_state_dict(module: nn.Module, files: Files) -> Any:
    from rankload import dist_load_state_dict_from_url

    return dist_load_state_dict_from_url(files.zip, map_location="{device}")


def _mapped(module: nn.Module, files: Files) -> None:
    _into(module, torch.load(files.zip, mmap=True, weights_only=True))


def _mapped_onto_device(module: nn.Module, files: Files) -> Any:
    return torch.load(files.zip, mmap=True, map_location=_device(), weights_only=True)


def _torch_load(module: nn.Module, files: Files) -> None:
    _into(module, torch.load(files.zip, map_location="cpu", weights_only=True))


def _onto_device(module: nn.Module, files: Files) -> Any:
    return torch.load(files.zip, map_location=_device(), weights_only=True)


def _safetensors(module: nn.Module, files: Files) -> Any:
    from safetensors.torch import load_file

    return load_file(files.safetensors, device=str(_device()))


def _fastsafetensors(module: nn.Module, files: Files) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), str(_device()), nogds=True)
    loader.add_filenames({0: [os.fspath(files.safetensors)]})
    buffer = loader.copy_files_to_device()
    return {name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx}


def _accelerate(module: nn.Module, files: Files) -> None:
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(module, os.fspath(files.safetensors), device_map={"": _device().index})


_BOTH, _MODULE, _DICT = (frozenset[Kind](kinds) for kinds in (("module", "meta"), ("module",), ("state_dict",)))
ONTO_DEVICE = "torch.load(map_location=cuda)"

#: Ways to a state dict on the device, which load_state_dict then copies into a module.
_DICTS = (
    ModuleWay(ONTO_DEVICE, _onto_device, _DICT),
    ModuleWay("torch.load(map_location=cuda, mmap=True)", _mapped_onto_device, _DICT),
    ModuleWay("safetensors load_file(device=cuda)", _safetensors, _DICT, ("safetensors.torch",)),
    ModuleWay("fastsafetensors", _fastsafetensors, _DICT, ("fastsafetensors",)),
)

WAYS = (
    ModuleWay(FLOOR, _floor, _BOTH | _DICT),
    ModuleWay(RANKLOAD, _rankload_state_dict, _DICT),
    ModuleWay(RANKLOAD, _rankload("zip"), _BOTH),
    ModuleWay("rankload, safetensors", _rankload("safetensors"), _BOTH),
    *_DICTS,
    *(ModuleWay(f"load_state_dict({way.name})", _then_into_module(way.load), _BOTH, way.needs) for way in _DICTS),
    ModuleWay(MAPPED, _mapped, _MODULE),
    ModuleWay(TORCH_LOAD, _torch_load, _MODULE),
    ModuleWay("runai-model-streamer, copied", runai, _MODULE, ("runai_model_streamer",)),
    ModuleWay("accelerate.load_checkpoint_in_model", _accelerate, _BOTH, ("accelerate",)),
)
