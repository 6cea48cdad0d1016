"""A transformer's weights from one node's disk to three others, over links of 1 Gbit/s: the ways that people use.

The nodes are network namespaces with links that are shaped by tc, one rank on each; only the first has the file, in a
filesystem of its own. Seconds are the slowest rank's, and are compared with S/B: the bytes over the bandwidth, which no
way can go below. Needs root.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bounds import Bound
from benchmarks.table import Table
from benchmarks.transformer import Transformer
from cluster.lab import Lab

NODES = 4
GBIT = 1
_LAYERS = 2
_PORT = 29_500  # of a network namespace that nobody else is in

_FLOOR = "S/B"
_STATE_DICT = "rankload, state dict"
_MODULE = "rankload, into a module"
_FLAT = "dist.broadcast of one buffer (gloo)"
_EACH = "dist.broadcast of each tensor (gloo)"
_DCP = "DCP broadcast_from_rank0"

_BOUNDS = (
    Bound(_STATE_DICT, _FLOOR, at_most=1.25),
    Bound(_MODULE, _FLOOR, at_most=1.25),
    Bound(_FLAT, _STATE_DICT),
    Bound(_DCP, _MODULE),
)


def broadcast(rounds: int) -> Table:
    """Measure it."""
    with Lab(NODES) as lab:
        try:
            for node in lab.nodes:
                lab.limit(node, "mg0", f"{GBIT}gbit")
            results = _run(lab, rounds)
        finally:
            lab.remove_files()
    size_bytes = results.pop("size_bytes")[0]
    floor = size_bytes * 8 / (GBIT * 1e9)
    return Table(
        "broadcast",
        f"broadcast, {NODES} nodes, {GBIT} Gbit/s, {size_bytes / 1e9:.2f} GB, medians of {rounds}, slowest rank",
        {_FLOOR: [floor] * rounds, **results},
        {name: f"{statistics.median(seconds) / floor:.2f} x S/B" for name, seconds in results.items()},
        _BOUNDS,
    )


def _run(lab: Lab, rounds: int) -> dict[str, list[float]]:
    python_path = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)  # a node starts elsewhere
    ranks: list[subprocess.Popen[str]] = []
    for rank, node in enumerate(lab.nodes):
        variables = {"RANK": rank, "WORLD_SIZE": NODES, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        variables |= {"MASTER_ADDR": lab.nodes[0], "MASTER_PORT": _PORT, "PYTHONPATH": python_path}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        command = (sys.executable, "-m", "benchmarks.broadcast", lab.scratch / "weights.pth", str(rounds))
        ranks.append(lab.start(node, *command, env=environment, stdout=subprocess.PIPE))
    outputs = [rank.communicate(timeout=1800)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank of the broadcast benchmark has failed")
    results: dict[str, list[float]] = json.loads(outputs[0].splitlines()[-1])
    return results


# --- in a rank --------------------------------------------------------------------------------------------------------


def _rank(path: Path, rounds: int) -> None:
    """Run all ways in turn; rank 0 prints the slowest rank's seconds."""
    torch.set_num_threads(1)  # as torchrun does
    for name in ("rankload._api.state_dict", "rankload._api.module", "torch.distributed.checkpoint.state_dict"):
        importlib.import_module(name)
    dist.init_process_group("gloo")
    module = Transformer(_LAYERS)
    tensors = [parameter.detach() for parameter in module.parameters()]
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        torch.save({name: tensor.clone().normal_() for name, tensor in module.state_dict().items()}, path)
    buffer = torch.zeros(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)
    ways: dict[str, Callable[[], Any]] = {
        _STATE_DICT: lambda: _state_dict(path),
        _MODULE: lambda: _into(module, path),
        _FLAT: lambda: dist.broadcast(buffer, 0),
        _EACH: lambda: [dist.broadcast(tensor, 0) for tensor in tensors],
        _DCP: lambda: _dcp(module, path),
    }
    results: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, load in ways.items():
            for tensor in tensors:
                tensor.zero_()
            results[name].append(_slowest(load))
            if name in (_MODULE, _DCP):
                assert all(bool(tensor.view(torch.uint8).view(-1)[::512].any()) for tensor in tensors), name
    if dist.get_rank() == 0:
        print(json.dumps({"size_bytes": [buffer.numel()], **results}))
    dist.barrier()
    dist.destroy_process_group()


def _slowest(load: Callable[[], Any]) -> float:
    dist.barrier()
    began_at = time.perf_counter()
    kept = load()
    seconds = torch.tensor(time.perf_counter() - began_at)
    del kept
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _state_dict(path: Path) -> Any:
    from rankload import dist_load_state_dict_from_url

    state_dict = dist_load_state_dict_from_url(path, delivery="broadcast")
    assert all(tensor.view(torch.uint8).view(-1)[::512].any() for tensor in state_dict.values())
    return state_dict


def _into(module: torch.nn.Module, path: Path) -> None:
    from rankload import dist_load_into

    dist_load_into(module, path, delivery="broadcast")


def _dcp(module: torch.nn.Module, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state_dict = torch.load(path, mmap=True, weights_only=True) if dist.get_rank() == 0 else {}
    set_model_state_dict(module, state_dict, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]))
