"""`delivery="gather"` where only some ranks hold the same parts: HSDP, tensor parallel, pipelines, optimizers."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from ranks.test_into_modules import Net, _full, _hybrid, _own_bytes, _steps, _tensor_parallel

#: Of a buffer, in these tests: many buckets.
_BUFFER_BYTES = 64 << 10


class WideBlock(nn.Module):
    """Half a row is worth a system call; one half is larger than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(256, 2051), nn.LayerNorm(2051), nn.Linear(2051, 256, bias=False)
        self.register_buffer("positions", torch.rand(5, 7))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([WideBlock()])
        self.head = nn.Linear(256, 30)


def _sliced(net: Wide) -> nn.Module:
    """Tensor-parallel on a slice of the mesh: nothing but the larger mesh says that there are replicas."""
    from torch.distributed.device_mesh import init_device_mesh

    return _tensor_parallel(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"])


def _placed(net: Wide) -> nn.Module:
    """Replicated over the first, over the second, and over both dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    (block,) = net.blocks
    block.up.weight = nn.Parameter(distribute_tensor(block.up.weight, mesh, (Replicate(), Shard(0))))
    block.down.weight = nn.Parameter(distribute_tensor(block.down.weight, mesh, (Shard(1), Replicate())))
    net.head.weight = nn.Parameter(distribute_tensor(net.head.weight, mesh, (Replicate(), Replicate())))
    return net


_KINDS: dict[str, Callable[[Any], nn.Module]] = {"hybrid": _hybrid, "sliced": _sliced, "placed": _placed}
_CASES = [("hybrid", "cpu"), ("hybrid", "meta"), ("sliced", "cpu"), ("sliced", "meta"), ("placed", "cpu")]


def _cut_finely() -> None:
    from rankload._load.device import pinned

    pinned.BUFFER_BYTES = _BUFFER_BYTES


@contextmanager
def _counted_reads() -> Iterator[list[int]]:
    """Sizes of this process's reads of tensors."""
    sizes: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        sizes.append(preadv(descriptor, buffers, offset))
        return sizes[-1]

    os.preadv = counted  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        os.preadv = preadv


def _load_each(rank: int, url: str, model_dir: str) -> dict[str, Any]:
    from rankload import dist_fetch, dist_load_into

    _cut_finely()
    dist.init_process_group("gloo")
    dist_fetch(url, model_dir)
    results = {}
    for kind, device in _CASES:
        with torch.device(device):
            net = Wide()
        module = _KINDS[kind](net)
        with _counted_reads() as sizes:
            report = dist_load_into(module, url, model_dir, delivery="gather")
        results[f"{kind} on {device}"] = _full(net), sum(sizes), report.bytes_read, report.delivery, _own_bytes(net)
    dist.barrier()
    dist.destroy_process_group()
    return results


def test_each_byte_is_read_once_for_all_ranks(origin: Origin, cache_dir: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    content = Wide().state_dict()
    torch.save(content, tmp_path / "wide.pth")
    url = origin.add("wide.pth", tmp_path / "wide.pth")
    results = [result.value for result in run_ranks(_load_each, 4, args=(url, cache_dir))]
    tensor_bytes = sum(tensor.nbytes for tensor in content.values())
    for case in results[0]:
        tensors, read_bytes, reported_bytes, deliveries, own_bytes = zip(
            *(result[case] for result in results), strict=True
        )
        for found in tensors:
            assert all(torch.equal(found[name], tensor) for name, tensor in content.items()), case
        assert set(deliveries) == {"gather"}, case
        assert read_bytes == reported_bytes, case
        assert tensor_bytes <= sum(read_bytes) < tensor_bytes + 2000, case  # and small gaps between whole tensors
        assert max(read_bytes) < 0.55 * max(own_bytes), case


def _go_on_training(rank: int, path: Path) -> tuple[list[float], int, str]:
    from rankload import dist_load_into

    dist.init_process_group("gloo")
    torch.manual_seed(5)
    module = _hybrid(Net())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    report = dist_load_into((module, optimizer), path, delivery="gather")
    losses = _steps(module, optimizer, 2)
    dist.barrier()
    dist.destroy_process_group()
    return losses, report.bytes_read, report.delivery


def test_the_state_of_an_optimizer_is_read_once_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    _steps(net, optimizer, 2)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path := tmp_path / "training.pth")
    weight_bytes = sum(parameter.nbytes for parameter in net.parameters())
    all_bytes = 3 * weight_bytes + sum(buffer.nbytes for buffer in net.buffers())
    expected = _steps(net, optimizer, 2)
    results = [result.value for result in run_ranks(_go_on_training, 4, args=(path,))]
    for losses, _, delivery in results:
        assert losses == pytest.approx(expected, rel=1e-4) and delivery == "gather"
    read_bytes = [read for _, read, _ in results]
    # what lies between two whole tensors is read along with them, and in a file as small as this one that is much
    assert all_bytes <= sum(read_bytes) < 1.2 * all_bytes and max(read_bytes) < 0.31 * all_bytes


# --- not all ranks share ----------------------------------------------------------------------------------------------


def _load_stages(rank: int, path: Path) -> tuple[dict[str, torch.Tensor], str, int]:
    """Rank 4 has a stage of its own. The other four hold replicas, over both dimensions of a mesh, of theirs."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    from rankload import dist_load_into

    _cut_finely()
    dist.init_process_group("gloo")
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    module = nn.ModuleDict({"first" if rank < 4 else "last": nn.Linear(500, 1000)})
    if rank < 4:
        layer = module["first"]
        layer.weight = nn.Parameter(distribute_tensor(torch.zeros(1000, 500), mesh, (Replicate(), Replicate())))
        layer.bias = nn.Parameter(distribute_tensor(torch.zeros(1000), mesh["tp"], [Replicate()]))
    report = dist_load_into(module, path, delivery="gather", strict=False)
    result = _full(module), report.delivery, report.bytes_read
    dist.barrier()
    dist.destroy_process_group()
    return result


def test_a_stage_of_a_pipeline_shares_what_is_its_own(tmp_path: Path) -> None:
    torch.manual_seed(3)
    content = nn.ModuleDict({"first": nn.Linear(500, 1000), "last": nn.Linear(500, 1000)}).state_dict()
    torch.save(content, tmp_path / "stages.pth")
    results = [result.value for result in run_ranks(_load_stages, 5, args=(tmp_path / "stages.pth",))]
    for tensors, _, _ in results:
        assert len(tensors) == 2 and all(torch.equal(tensor, content[name]) for name, tensor in tensors.items())
    assert [delivery for _, delivery, _ in results] == ["gather"] * 4 + ["read"]
    read_bytes, stage_bytes = [read for _, _, read in results], 4 * (1000 * 500 + 1000)
    assert sum(read_bytes[:4]) == read_bytes[4] == stage_bytes and max(read_bytes[:4]) < 0.3 * stage_bytes


# --- failures ---------------------------------------------------------------------------------------------------------


def _load_where_a_disk_fails(rank: int, path: Path) -> tuple[str, bool]:
    """Rank 3 cannot read a piece in the middle; afterwards all process groups work, for another load."""
    from rankload import CacheError, dist_load_into

    _cut_finely()
    dist.init_process_group("gloo")
    module = _hybrid(Wide())
    preadv, size = os.preadv, path.stat().st_size

    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if 0.7 * size < offset < 0.8 * size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    if rank == 3:
        os.preadv = fail  # type: ignore[assignment]
    with pytest.raises(CacheError) as caught:
        dist_load_into(module, path, delivery="gather")
    os.preadv = preadv
    report = dist_load_into(module, path, delivery="gather")
    dist.barrier()
    dist.destroy_process_group()
    return str(caught.value), report.delivery == "gather"


@pytest.fixture
def wide_file(tmp_path: Path) -> Path:
    torch.save(Wide().state_dict(), path := tmp_path / "wide.pth")
    return path


def test_a_disk_that_fails_leaves_the_groups_of_the_mesh_whole(wide_file: Path) -> None:
    for result in run_ranks(_load_where_a_disk_fails, 4, args=(wide_file,)):
        text, has_loaded = result.value
        assert "Input/output error" in text and "rank 3" in text and has_loaded


def _load_where_one_is_killed(rank: int, path: Path) -> tuple[str, str, float]:
    from rankload import RankloadError, dist_load_into

    _cut_finely()
    dist.init_process_group("gloo")
    module = _hybrid(Wide())
    preadv, size = os.preadv, path.stat().st_size

    def read_and_die(descriptor: int, buffers: Any, offset: int) -> int:
        if rank == 3 and offset > 0.7 * size:
            os.kill(os.getpid(), signal.SIGKILL)
        return preadv(descriptor, buffers, offset)

    os.preadv = read_and_die  # type: ignore[assignment]
    began_at = time.monotonic()
    with pytest.raises(RankloadError) as caught:
        dist_load_into(module, path, delivery="gather")
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began_at


def test_a_rank_that_is_killed_ends_the_call_on_those_that_share_nothing_with_it(
    wide_file: Path, short_deadlines: float
) -> None:
    with start_ranks(_load_where_one_is_killed, 4, args=(wide_file,)) as group:
        results = [group.wait_for_end(rank) for rank in range(3)]
    for result in results:
        name, text, waited = result.value
        assert name == "RankLostError" and "rank 3" in text and waited < 10


# --- state dicts ------------------------------------------------------------------------------------------------------


def _load_state_dict(rank: int, path: Path, on_device: int) -> tuple[dict[str, torch.Tensor], int]:
    """The first ``on_device`` ranks take the CPU for an accelerator; returns the bytes copied out of the file, too."""
    from rankload import dist_load_state_dict_from_url
    from rankload._load.state_dict import deferred_storages

    _cut_finely()
    dist.init_process_group("gloo")
    memmove, sizes = deferred_storages.ctypes.memmove, []

    def counted(target: int, source: int, size: int) -> None:
        sizes.append(size)
        memmove(target, source, size)

    deferred_storages.ctypes.memmove = counted  # type: ignore[assignment]
    deferred_storages.is_staged = lambda device: rank < on_device
    deferred_storages.BUFFER_BYTES = _BUFFER_BYTES
    state_dict = dist_load_state_dict_from_url(path, map_location="cpu", delivery="gather")
    dist.barrier()
    dist.destroy_process_group()
    return state_dict, sum(sizes)


@pytest.mark.parametrize(("on_device", "file_format"), [(3, "zip"), (3, "parts"), (2, "zip"), (0, "zip")])
def test_a_state_dict_on_devices(tmp_path: Path, on_device: int, file_format: str) -> None:
    torch.manual_seed(3)
    content = Net().state_dict()
    if file_format == "zip":
        torch.save(content, path := tmp_path / "net.pth")
    else:
        del content["head.weight"]
        path = _in_parts(tmp_path, content)
    results = [result.value for result in run_ranks(_load_state_dict, 3, args=(path, on_device))]
    for state_dict, _ in results:
        assert state_dict.keys() == content.keys()
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in content.items())
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in content.values()}
    read_bytes, all_bytes = [read for _, read in results], sum(tensors.values())
    if on_device == 3:
        assert sum(read_bytes) == all_bytes and max(read_bytes) < 0.4 * all_bytes
    else:
        assert read_bytes == [all_bytes if rank < on_device else 0 for rank in range(3)]


def _in_parts(directory: Path, content: dict[str, torch.Tensor]) -> Path:
    names = list(content)
    weight_map = {name: f"part{number % 3}.safetensors" for number, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: content[name] for name in names if weight_map[name] == part}, directory / part)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path
