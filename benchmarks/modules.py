"""A transformer's weights, warm in the page cache, into the module of every rank: the ways that people use, in one run.

Each way runs in ranks of its own, new processes, and loads once: what it imports is imported before, and the module's
memory is touched before. ``state_dict``: nothing but the dict, mapped where the way does so. ``module``: every rank has
all parameters. ``meta``: the module was made on the meta device. ``fsdp``: ``fully_shard`` over all ranks. Seconds are
the slowest rank's; memory is what all ranks hold together after touching it (PSS, above what they held before), and
the largest growth of one rank's resident memory on the way.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.bounds import Bound
from benchmarks.module_ways import (
    DCP,
    HUB,
    MAPPED,
    MODULE_WAYS,
    RANKLOAD,
    TORCH_LOAD,
    Case,
    Files,
    Measured,
    load_in_rank,
)
from benchmarks.module_ways import ModuleWay as Way
from benchmarks.transformer import Transformer
from harness.ranks import start_ranks

_BOUNDS: dict[Case, tuple[Bound, ...]] = {
    "state_dict": (Bound(HUB, RANKLOAD, at_least=50),),
    "module": (
        Bound(TORCH_LOAD, RANKLOAD, at_least=6),
        Bound(DCP, RANKLOAD, at_least=8),
        Bound(RANKLOAD, MAPPED, at_most=1.15),
    ),
    "meta": (),
    "fsdp": (Bound(DCP, RANKLOAD, at_least=8),),
}

_CASES: tuple[Case, ...] = ("state_dict", "module", "meta", "fsdp")


def modules(layers: int, world_size: int, rounds: int, scratch: Path) -> None:
    """Print the table of each case, and what is promised of it."""
    files = _write(scratch, layers)
    for case in _CASES:
        ways = [way for way in MODULE_WAYS if case in way.cases and way.is_installed]
        if missing := [way.name for way in MODULE_WAYS if case in way.cases and not way.is_installed]:
            print(f"\n{case}: left out, for they are not installed: {', '.join(missing)}")
        results: dict[str, list[tuple[list[Measured], int]]] = defaultdict(list)
        for _ in range(rounds):
            for way in ways:
                results[way.name].append(_run(way, case, layers, files, world_size))
        print(f"\n{case}, {world_size} ranks, {files.size_bytes / 1e9:.2f} GB bf16, medians of {rounds}, slowest rank")
        for name, runs in results.items():
            print(f"  {name:40} {_row(runs, files.size_bytes)}")
        for bound in _BOUNDS[case]:
            above, below = (_seconds(results[name]) for name in (bound.above, bound.below))
            ratios = [first / second for first, second in zip(above, below, strict=True)]
            ratio = statistics.median(above) / statistics.median(below)
            spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"  {bound.above} : {bound.below} = {ratio:.2f} {spread}{bound.verdict(ratio)}")


def _row(runs: list[tuple[list[Measured], int]], size_bytes: int) -> str:
    seconds = _seconds(runs)
    held = statistics.median(held for _, held in runs) / size_bytes
    growth = statistics.median(max(rank.growth_bytes for rank in ranks) for ranks, _ in runs)
    read = statistics.median(max(rank.read_bytes / rank.shard_bytes for rank in ranks) for ranks, _ in runs)
    return (
        f"{statistics.median(seconds):7.3f} s ({min(seconds):.3f}-{max(seconds):.3f})  "
        f"held {held:5.2f} x the file, peak + {growth / 1e6:6.0f} MB a rank, read {read:.3f} x its part"
    )


def _seconds(runs: list[tuple[list[Measured], int]]) -> list[float]:
    return [max(rank.seconds for rank in ranks) for ranks, _ in runs]


def _run(way: Way, case: Case, layers: int, files: Files, world_size: int) -> tuple[list[Measured], int]:
    """Return what each rank measured, and the memory that all hold afterwards, in bytes."""
    with start_ranks(load_in_rank, world_size, args=(way, case, layers, files)) as group:
        group.wait_for_mark("ready", timeout_seconds=300)
        before = sum(group.pss_bytes())
        group.open_gate("ready")
        group.wait_for_mark("touched", timeout_seconds=300)
        held = sum(group.pss_bytes()) - before
        group.open_gate("touched")
        return [result.value for result in group.wait()], held


def _write(directory: Path, layers: int) -> Files:
    torch.manual_seed(0)
    state_dict = {name: tensor.detach().normal_() for name, tensor in Transformer(layers).state_dict().items()}
    path, safetensors_path = directory / "transformer.pth", directory / "transformer.safetensors"
    torch.save(state_dict, path)
    save_file(state_dict, safetensors_path)
    return Files(path, safetensors_path, sum(tensor.nbytes for tensor in state_dict.values()))
