"""Weights into the module of every rank: the ways that people use, in one run.

Each way runs in ranks of its own, new processes, and loads once: what it imports is imported before, and the module's
memory is touched before. The files are in the page cache, or, with ``--cold``, on the disk alone.

``state_dict``: nothing but the dict, mapped where the way does so. ``module``: every rank has all parameters. ``meta``:
the module was made on the meta device. ``fsdp``: ``fully_shard`` over all ranks. ``tensor-parallel``: attention and
feed-forward cut over all ranks. ``many-small-tensors``: ResNet-50's, replicated.

Seconds are the slowest rank's; memory is what all ranks hold together after touching it (PSS, above what they held
before), and the largest growth of one rank's resident memory on the way.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.bounds import Bound
from benchmarks.models import Model, make
from benchmarks.module_ways import (
    DCP,
    HUB,
    MAPPED,
    MODULE_WAYS,
    RANKLOAD,
    TORCH_LOAD,
    Files,
    Kind,
    Measured,
    ModuleWay,
    load_in_rank,
)
from benchmarks.rounds import interleaved
from benchmarks.table import Table
from harness.origin import Origin
from harness.ranks import start_ranks
from rankload import dist_fetch


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        name: of the table.
        kind: of module that is loaded into.
        model: whose weights.
        bounds: what is promised.
    """

    name: str
    kind: Kind
    model: Model = "transformer"
    bounds: Sequence[Bound] = ()


CASES = (
    Case("state_dict", "state_dict", bounds=(Bound(HUB, RANKLOAD, at_least=30),)),
    Case(
        "module",
        "module",
        bounds=(
            Bound(TORCH_LOAD, RANKLOAD, at_least=6),
            Bound(DCP, RANKLOAD, at_least=8),
            Bound(RANKLOAD, MAPPED, at_most=1.15),
        ),
    ),
    Case("meta", "meta"),
    Case("fsdp", "fsdp", bounds=(Bound(DCP, RANKLOAD, at_least=8),)),
    Case("tensor-parallel", "tensor-parallel", bounds=(Bound(DCP, RANKLOAD),)),
    Case("many-small-tensors", "module", "resnet", (Bound(TORCH_LOAD, RANKLOAD), Bound(DCP, RANKLOAD))),
)


def modules(
    only: Sequence[str] | None, layers: int, world_size: int, rounds: int, scratch: Path, *, is_cold: bool
) -> Iterator[Table]:
    """Yield the table of each case, or of some, by their names."""
    files: dict[str, Files] = {}
    for case in CASES:
        if only is not None and case.name not in only:
            continue
        if case.model not in files:
            files[case.model] = write_files(scratch, case.model, layers)
        yield _measured(case, files[case.model], layers, world_size, rounds, is_cold=is_cold)


def _measured(case: Case, files: Files, layers: int, world_size: int, rounds: int, *, is_cold: bool) -> Table:
    ways = [way for way in MODULE_WAYS if case.kind in way.kinds and way.is_installed]
    if missing := [way.name for way in MODULE_WAYS if case.kind in way.kinds and not way.is_installed]:
        print(f"\n{case.name}: left out, for they are not installed: {', '.join(missing)}")
    results: dict[str, list[tuple[list[Measured], int]]] = defaultdict(list)
    for way in interleaved(ways, rounds):
        if is_cold:
            _drop_from_page_cache(files)
        results[way.name].append(_run(way, case, layers, files, world_size))
    return Table(
        f"{case.name}-cold" if is_cold else case.name,
        f"{case.name}, {'cold' if is_cold else 'warm'}, {world_size} ranks, {files.size_bytes / 1e9:.2f} GB in "
        f"{files.tensor_count} tensors, medians of {rounds}, slowest rank",
        {name: [max(rank.seconds for rank in ranks) for ranks, _ in runs] for name, runs in results.items()},
        {name: _note(runs, files.size_bytes) for name, runs in results.items()},
        () if is_cold else case.bounds,
    )


def _drop_from_page_cache(files: Files) -> None:
    for path in (files.zip, files.safetensors):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # dirty pages cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _note(runs: list[tuple[list[Measured], int]], size_bytes: int) -> str:
    held = statistics.median(held for _, held in runs) / size_bytes
    growth = statistics.median(max(rank.growth_bytes for rank in ranks) for ranks, _ in runs)
    read = statistics.median(max(rank.read_bytes / rank.shard_bytes for rank in ranks) for ranks, _ in runs)
    return f"held {held:.2f} x the file, peak + {growth / 1e6:.0f} MB a rank, read {read:.3f} x its part"


def _run(way: ModuleWay, case: Case, layers: int, files: Files, world_size: int) -> tuple[list[Measured], int]:
    """Return what each rank measured, and the memory that all hold afterwards, in bytes."""
    with start_ranks(load_in_rank, world_size, args=(way, case.kind, case.model, layers, files)) as group:
        group.wait_for_mark("ready", timeout_seconds=300)
        before = sum(group.pss_bytes())
        group.open_gate("ready")
        group.wait_for_mark("touched", timeout_seconds=300)
        held = sum(group.pss_bytes()) - before
        group.open_gate("touched")
        return [result.value for result in group.wait()], held


def write_files(directory: Path, model: Model, layers: int) -> Files:
    """Write a model's weights in both formats, and fetch them into the cache, as published files alone are mapped."""
    torch.manual_seed(0)
    state_dict = {
        name: tensor.detach().normal_() if tensor.is_floating_point() else tensor + 1
        for name, tensor in make(model, layers).state_dict().items()
    }
    sources = {f"{model}.pth": torch.save, f"{model}.safetensors": save_file}
    urls, paths = [], []
    with Origin() as origin:
        for name, save in sources.items():
            saved = directory / f"{name}.saved"
            save(state_dict, saved)
            urls.append(origin.add(name, saved))
            paths.append(dist_fetch(urls[-1], directory, progress=False))
            saved.unlink()
    size_bytes = sum(tensor.nbytes for tensor in state_dict.values())
    return Files(paths[0], urls[0], paths[1], urls[1], size_bytes, len(state_dict))
