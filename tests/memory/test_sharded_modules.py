"""A rank of a sharded module reads its own part of the file, and never has more than that in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from harness import mounts
from harness.checkpoints import write_big
from harness.nodes import become_node
from harness.ranks import run_ranks

FILE_BYTES = 800_000_000
RANKS = 4


def _load(rank: int, path: Path, delivery: str, directory: Path) -> tuple[int, int, int]:
    """Returns the bytes of this rank's part, those that it read, and how much larger it was at the most."""
    import torch.distributed.tensor
    from torch.distributed.fsdp import fully_shard

    import rankload._api.module

    if delivery == "broadcast":
        become_node(rank, directory)
    dist.init_process_group("gloo")
    with torch.device("meta"):
        # the file's names are layers.0.weight, layers.1.weight, …
        sizes = [tensor.shape for tensor in torch.load(path, mmap=True).values()]
        layers = [nn.Linear(columns, rows, bias=False).bfloat16() for rows, columns in sizes]
        module = nn.Sequential()
        module.layers = nn.Sequential(*layers)
    fully_shard(module)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peak_before, read_before = _peak_bytes(), _read_bytes()
    report = rankload.dist_load_into(module, path, delivery=delivery)
    growth, read = _peak_bytes() - peak_before, _read_bytes() - read_before
    own = sum(parameter.to_local().nbytes for parameter in module.parameters())
    assert report.bytes_read == own
    dist.barrier()
    dist.destroy_process_group()
    return own, read, growth


def _peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def test_a_sharded_module_costs_a_rank_its_shard(tmp_path: Path) -> None:
    checkpoint = write_big(tmp_path, FILE_BYTES)
    for result in run_ranks(_load, RANKS, args=(checkpoint.path, "read", tmp_path)):
        own, read, growth = result.value
        assert 0.9 * FILE_BYTES < RANKS * own < 1.1 * FILE_BYTES
        assert own <= read <= 1.02 * own
        assert own <= growth <= own + 64_000_000


@pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))
def test_and_so_it_does_when_another_node_sends_it(tmp_path: Path) -> None:
    checkpoint = write_big(tmp_path, FILE_BYTES)
    for rank, result in enumerate(run_ranks(_load, RANKS, args=(checkpoint.path, "broadcast", tmp_path))):
        own, read, growth = result.value
        assert rank == 0 or read < 5_000_000  # what the source sends counts as read by it
        assert own <= growth <= own + 64_000_000
