"""`delivery="gather"`: ranks read shares of what all of them want, and get the rest from one another."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import checkpoints
from harness.ranks import run_ranks, start_ranks
from ranks.test_into_modules import _KINDS, Net, _full

#: Of a share, in these tests: many buckets.
_SHARE_BYTES = 1024


def _cut_finely() -> None:
    from rankload._load.device import pinned

    pinned.BUFFER_BYTES = _SHARE_BYTES


def _load(
    rank: int, path: Path, kind: str, device: str, delivery: str
) -> tuple[dict[str, torch.Tensor], int, str, str, bool]:
    from rankload import dist_load_into

    _cut_finely()
    dist.init_process_group("gloo")
    with torch.device(device):
        net = Net()
    module = net if kind == "plain" else _KINDS[kind](net)
    report = dist_load_into(module, path, delivery=delivery)
    assert report.missing_keys == report.unexpected_keys == [] and report.path == path
    is_tied = net.head.weight is net.embedding.weight
    result = _full(net), report.bytes_read, report.delivery, report.reason, is_tied
    dist.barrier()
    dist.destroy_process_group()
    return result


def _check(results: list[Any], content: dict[str, torch.Tensor]) -> None:
    for result in results:
        tensors, _, _, _, is_tied = result.value
        assert is_tied
        for name, tensor in content.items():
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(
    ("world_size", "device", "file_format"),
    [(2, "cpu", "zip"), (3, "cpu", "safetensors"), (4, "meta", "zip"), (3, "meta", "safetensors")],
)
def test_each_reads_its_share(tmp_path: Path, world_size: int, device: str, file_format: str) -> None:
    torch.manual_seed(3)
    content = Net().state_dict()
    del content["head.weight"]
    file = (checkpoints.write_zip if file_format == "zip" else checkpoints.write_safetensors)(tmp_path, content)
    results = run_ranks(_load, world_size, args=(file.path, "plain", device, "gather"))
    _check(results, content)
    tensor_bytes = sum(tensor.nbytes for tensor in content.values())
    read = [result.value[1] for result in results]
    assert tensor_bytes <= sum(read) <= file.path.stat().st_size
    assert max(read) < 1.2 * tensor_bytes / world_size
    assert [result.value[2:4] for result in results] == [("gather", "it was asked for")] * world_size


@pytest.mark.parametrize("kind", ["ddp", "by-hand"])
def test_wrapped_and_sharded_modules(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    content = Net().state_dict()
    torch.save(content, tmp_path / "net.pth")
    results = run_ranks(_load, 4, args=(tmp_path / "net.pth", kind, "cpu", "gather"))
    _check(results, content)
    assert {result.value[2] for result in results} == {"gather"}


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_auto_reads_on_the_cpu_and_says_why(tmp_path: Path, kind: str) -> None:
    content = Net().state_dict()
    torch.save(content, tmp_path / "net.pth")
    results = run_ranks(_load, 4, args=(tmp_path / "net.pth", kind, "cpu", "auto"))
    _check(results, content)
    assert {result.value[2] for result in results} == {"read"}
    assert all("each rank reads" in result.value[3] for result in results)


def _load_stages(rank: int, path: Path) -> tuple[dict[str, torch.Tensor], str, str]:
    from rankload import dist_load_into

    dist.init_process_group("gloo")
    module = nn.ModuleDict({f"stage{number}": nn.Linear(40, 40) for number in {0, rank}})
    report = dist_load_into(module, path, delivery="gather", strict=False)
    dist.destroy_process_group()
    return module.state_dict(), report.delivery, report.reason


def test_ranks_that_want_different_tensors_read_them(tmp_path: Path) -> None:
    content = nn.ModuleDict({f"stage{rank}": nn.Linear(40, 40) for rank in range(3)}).state_dict()
    torch.save(content, tmp_path / "stages.pth")
    for result in run_ranks(_load_stages, 3, args=(tmp_path / "stages.pth",)):
        tensors, delivery, reason = result.value
        assert all(torch.equal(tensor, content[name]) for name, tensor in tensors.items())
        assert delivery == "read" and reason.startswith("another rank")


def _load_with_optimizer(rank: int, path: Path) -> Any:
    from rankload import dist_load_into

    dist.init_process_group("gloo")
    module = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(module.parameters())
    report = dist_load_into((module, optimizer), path, delivery="gather")
    dist.destroy_process_group()
    return module.state_dict(), optimizer.state_dict(), report.delivery


def test_with_an_optimizer(tmp_path: Path) -> None:
    module = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(30)).sum().backward()
    optimizer.step()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "training.pth")
    for result in run_ranks(_load_with_optimizer, 2, args=(tmp_path / "training.pth",)):
        weights, state, delivery = result.value
        assert torch.equal(weights["weight"], module.weight) and delivery == "gather"
        assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def _load_over_subgroup(rank: int, path: Path) -> tuple[bool, int] | None:
    from rankload import dist_load_into

    dist.init_process_group("gloo")
    members = [3, 1]
    group = dist.new_group(members)
    result = None
    if rank in members:
        module = nn.Linear(100, 100)
        report = dist_load_into(module, path, delivery="gather", group=group)
        result = bool((module.weight == 3).all()), report.bytes_read
    dist.barrier()
    dist.destroy_process_group()
    return result


def test_over_a_group(tmp_path: Path) -> None:
    content = {"weight": torch.full((100, 100), 3.0), "bias": torch.ones(100)}
    torch.save(content, tmp_path / "linear.pth")
    results = [result.value for result in run_ranks(_load_over_subgroup, 4, args=(tmp_path / "linear.pth",))]
    assert results[0] is results[2] is None
    assert results[1][0] and results[3][0] and results[1][1] < 22000 and results[3][1] < 22000


def _load_without_group(rank: int, path: Path) -> str:
    from rankload import ArgumentError, dist_load_into

    with pytest.raises(ArgumentError) as caught:
        dist_load_into(nn.Linear(3, 3), path, delivery="gather")
    return str(caught.value)


def test_without_a_process_group_it_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "linear.pth")
    for result in run_ranks(_load_without_group, 2, args=(tmp_path / "linear.pth",)):
        assert "no process group with a backend for the device 'cpu'" in result.value


# --- failures ---------------------------------------------------------------------------------------------------------

_ROWS = 2000


def _load_where_a_disk_fails(rank: int, path: Path) -> tuple[str, str, float]:
    """Rank 1 cannot read a piece in the middle; afterwards the process group still works."""
    from rankload import CacheError, dist_load_into
    from rankload._load.values import tensors

    _cut_finely()
    dist.init_process_group("gloo")
    preadv = os.preadv

    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if offset > path.stat().st_size // 2 and len(buffers[0]) <= _SHARE_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    if rank == 1:
        tensors.os.preadv = fail
    with pytest.raises(CacheError) as caught:
        dist_load_into(nn.Linear(100, _ROWS), path, delivery="gather")
    tensors.os.preadv = preadv
    dist.all_reduce(total := torch.ones(()))
    dist.barrier()
    dist.destroy_process_group()
    return type(caught.value).__name__, str(caught.value), total.item()


@pytest.fixture
def linear_file(tmp_path: Path) -> Path:
    torch.save(nn.Linear(100, _ROWS).state_dict(), path := tmp_path / "linear.pth")
    return path


def test_a_disk_that_fails_fails_all_and_leaves_the_process_group_whole(linear_file: Path) -> None:
    for result in run_ranks(_load_where_a_disk_fails, 3, args=(linear_file,)):
        name, text, total = result.value
        assert name == "CacheError" and "Input/output error" in text and "rank 1" in text
        assert total == 3


def _load_where_memory_is_short(rank: int, path: Path) -> tuple[str, str, float]:
    """Rank 1 fails for want of memory before the first collective; afterwards the process group still works."""
    from rankload import dist_load_into
    from rankload._load.streams import whole_tensors
    from rankload.errors import RankFailedError

    dist.init_process_group("gloo")

    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    if rank == 1:
        whole_tensors.TensorAssemblers = fail  # type: ignore[misc,assignment]
    began_at = time.monotonic()
    with pytest.raises(RankFailedError) as caught:
        dist_load_into(nn.Linear(100, _ROWS), path, delivery="gather")
    waited = time.monotonic() - began_at
    dist.all_reduce(total := torch.ones(()))
    dist.barrier()
    dist.destroy_process_group()
    assert total == 3
    return type(caught.value).__name__, str(caught.value), waited


def test_a_rank_that_is_short_of_memory_fails_all_before_the_first_collective(linear_file: Path) -> None:
    for result in run_ranks(_load_where_memory_is_short, 3, args=(linear_file,)):
        _, text, waited = result.value
        assert "out of memory" in text and "rank 1" in text and waited < 8


def _load_where_a_file_hangs(rank: int, path: Path) -> tuple[str, str, float]:
    from rankload import RankloadError, dist_load_into
    from rankload._load.module.checkpoint_files import CheckpointFiles

    _cut_finely()
    dist.init_process_group("gloo")
    read = CheckpointFiles.read

    def read_or_hang(self: CheckpointFiles, name: str, address: int, offset: int, length: int, *, what: str) -> None:
        if rank == 1 and what == "its tensors" and offset > path.stat().st_size // 2:
            threading.Event().wait()
        read(self, name, address, offset, length, what=what)

    CheckpointFiles.read = read_or_hang  # type: ignore[method-assign]
    began_at = time.monotonic()
    with pytest.raises(RankloadError) as caught:
        dist_load_into(nn.Linear(100, _ROWS), path, delivery="gather", timeout=2)
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began_at


def test_a_file_that_hangs_on_one_rank_ends_the_call_on_all(linear_file: Path) -> None:
    for result in run_ranks(_load_where_a_file_hangs, 3, args=(linear_file,)):
        name, text, waited = result.value
        assert name == "ProgressTimeoutError" and "timeout=" in text
        assert 1.9 < waited < 15


def _load_where_one_leaves(rank: int, path: Path, leaver: int, how: str, after: float) -> tuple[str, str, float]:
    from rankload import RankloadError, dist_load_into
    from rankload._load.module.checkpoint_files import CheckpointFiles

    _cut_finely()
    dist.init_process_group("gloo")
    read = CheckpointFiles.read

    def read_and_leave(self: CheckpointFiles, name: str, address: int, offset: int, length: int, *, what: str) -> None:
        if rank == leaver and what == "its tensors" and offset >= after * path.stat().st_size:
            os.kill(os.getpid(), getattr(signal, how))
        read(self, name, address, offset, length, what=what)

    CheckpointFiles.read = read_and_leave  # type: ignore[method-assign]
    began_at = time.monotonic()
    with pytest.raises(RankloadError) as caught:
        dist_load_into(nn.Linear(100, _ROWS), path, delivery="gather")
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began_at


@pytest.mark.parametrize(
    ("leaver", "how", "after", "kind", "text"),
    [
        (0, "SIGKILL", 0.5, "RankLostError", "rank 0"),
        (2, "SIGKILL", 0.0, "RankLostError", "rank 2"),  # before it has given any sign of life
        (2, "SIGSTOP", 0.5, "RankLostError", "rank 2"),
        (0, "SIGSTOP", 0.0, "RankLostError", "rank 0"),
        (1, "SIGTERM", 0.5, "CallCancelledError", "SIGTERM"),
    ],
)
def test_rank_that_leaves(
    linear_file: Path, short_deadlines: float, leaver: int, how: str, after: float, kind: str, text: str
) -> None:
    with start_ranks(_load_where_one_leaves, 3, args=(linear_file, leaver, how, after)) as group:
        others = [rank for rank in range(3) if rank != leaver]
        results = {rank: group.wait_for_end(rank) for rank in others}
    for rank in others:
        name, words, waited = results[rank].value
        assert waited < 10
        assert name == kind and text in words, words


# --- a real accelerator -----------------------------------------------------------------------------------------------


def _load_on_accelerator(rank: int, path: Path, delivery: str, on_meta: bool) -> tuple[dict[str, Any], str, str, int]:
    from rankload import dist_load_into

    device = torch.accelerator.current_accelerator()
    assert device is not None
    os.environ["NCCL_HOSTID"] = f"host{rank}"  # or NCCL refuses two ranks on one device, which we use for want of two
    backend = {"cuda": "nccl", "xpu": "xccl"}[device.type]
    device = torch.device(device.type, 0)
    torch.accelerator.set_device_index(device.index)
    dist.init_process_group(f"cpu:gloo,{device.type}:{backend}")
    with torch.device("meta" if on_meta else device):
        module = nn.Sequential(nn.Linear(1000, 3000), nn.BatchNorm1d(3000))
    report = dist_load_into(module, path, delivery=delivery)
    assert all(tensor.device == device for tensor in module.state_dict().values())
    weights = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    dist.barrier(device_ids=[device.index])
    dist.destroy_process_group()
    return weights, report.delivery, report.reason, report.bytes_read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("delivery", ["gather", "auto", "read"])
@pytest.mark.parametrize("on_meta", [False, True])
def test_on_a_real_accelerator(tmp_path: Path, delivery: str, on_meta: bool) -> None:
    source = nn.Sequential(nn.Linear(1000, 3000), nn.BatchNorm1d(3000))
    torch.save(source.state_dict(), path := tmp_path / "file")
    results = [result.value for result in run_ranks(_load_on_accelerator, 2, 120, args=(path, delivery, on_meta))]
    for weights, found, reason, bytes_read in results:
        assert all(torch.equal(weights[name], tensor) for name, tensor in source.state_dict().items())
        assert found == ("gather" if delivery == "gather" else "read"), reason
        assert delivery != "auto" or "each rank reads" in reason
        assert bytes_read < path.stat().st_size * (0.6 if found == "gather" else 1.1)
