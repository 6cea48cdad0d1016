"""``RANKLOAD_BROADCAST_OVER_GROUP=1``: tensors of a broadcast come over the process group, headers over TCP."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness import checkpoints, mounts
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from ranks.test_into_modules import _KINDS, Net, _full

#: Rows of a linear layer that takes many buckets of `_BUCKET_BYTES`.
_ROWS = 3000
_BUCKET_BYTES = 4096

needs_nodes = pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))


@pytest.fixture(autouse=True)
def over_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANKLOAD_BROADCAST_OVER_GROUP", "1")


def _cut_finely() -> None:
    """Let small tensors travel as large ones do: after the headers, and in several buckets."""
    from rankload._load.device import pinned
    from rankload._load.streams import buckets

    pinned.BUFFER_BYTES = _BUCKET_BYTES
    buckets.BUCKET_BYTES, buckets._SMALL_BYTES, buckets._GAP_BYTES = 1000, (100,), 0


def _count_bytes() -> dict[str, int]:
    """Count the bytes that this rank moves over the process group, and receives over TCP."""
    from rankload._load.sharing.broadcast_group import BroadcastGroup
    from rankload._relay.relay import Relay

    moved = {"group": 0, "tcp": 0}
    start, receive = BroadcastGroup._start, Relay.receive

    def start_and_count(self: BroadcastGroup, content: torch.Tensor, number: int) -> Any:
        moved["group"] += content.nbytes
        return start(self, content, number)

    def receive_and_count(self: Relay, memory: memoryview) -> str:
        moved["tcp"] += len(memory)
        return receive(self, memory)

    BroadcastGroup._start = start_and_count  # type: ignore[method-assign]
    Relay.receive = receive_and_count  # type: ignore[method-assign]
    return moved


def _load(
    rank: int, url: str, directory: Path, kind: str, device: str, src: int
) -> tuple[dict[str, torch.Tensor], str, int, bool, dict[str, int]]:
    from rankload import dist_load_into

    _cut_finely()
    moved = _count_bytes()
    dist.init_process_group("gloo")
    with torch.device(device):
        net = Net()
    module = _KINDS[kind](net)
    cache = directory / f"cache-{rank}"
    report = dist_load_into(module, url, cache, delivery="broadcast", src=src)
    assert report.missing_keys == report.unexpected_keys == []
    assert (report.path is not None) == (rank == src) == bool(report.fetch_reason)
    assert net.head.weight is net.embedding.weight
    result = _full(net), report.delivery, report.bytes_read, cache.exists(), moved
    dist.barrier()
    dist.destroy_process_group()
    return result


@pytest.mark.parametrize(
    ("kind", "device", "src", "file_format"),
    [
        ("ddp", "cpu", 0, "zip"),
        ("fsdp", "meta", 1, "zip"),
        ("fsdp-and-tensor-parallel", "cpu", 2, "safetensors"),
    ],
)
def test_tensors_come_over_the_process_group(
    origin: Origin, tmp_path: Path, kind: str, device: str, src: int, file_format: str
) -> None:
    torch.manual_seed(3)
    content = Net().state_dict()
    if file_format == "safetensors":
        del content["head.weight"]
    file = (checkpoints.write_zip if file_format == "zip" else checkpoints.write_safetensors)(tmp_path, content)
    url = origin.add(file.name, file.path)

    results = run_ranks(_load, 4, args=(url, tmp_path, kind, device, src))

    large_bytes = sum(
        tensor.nbytes for name, tensor in content.items() if tensor.nbytes > 100 and name != "head.weight"
    )
    headers_bytes = file.path.stat().st_size - large_bytes
    for rank, result in enumerate(results):
        tensors, delivery, bytes_read, has_cache, moved = result.value
        assert all(torch.equal(tensors[name], tensor) for name, tensor in content.items())
        assert delivery == "broadcast" and bytes_read > 0 and has_cache == (rank == src)
        assert large_bytes <= moved["group"] <= file.path.stat().st_size
        assert (moved["tcp"] == 0) if rank == src else (0 < moved["tcp"] <= 2 * headers_bytes + 4000)
    assert origin.bytes_sent() == file.path.stat().st_size


def _load_odd(rank: int, path: Path) -> dict[str, torch.Tensor]:
    """Load tensors that are not contiguous, or get another dtype, and one that only this rank wants."""
    from rankload import dist_load_into

    _cut_finely()
    dist.init_process_group("gloo")
    module = nn.ParameterDict({"turned": torch.zeros(40, 30), "narrow": torch.zeros(50, 20, dtype=torch.bfloat16)})
    if rank == 1:
        module["own"] = torch.zeros(300)
    dist_load_into(module, path, delivery="broadcast", strict=False)
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    dist.destroy_process_group()
    return tensors


def test_layouts_dtypes_and_tensors_that_the_source_does_not_want(tmp_path: Path) -> None:
    torch.manual_seed(4)
    content = {"turned": torch.randn(30, 40).t(), "narrow": torch.randn(50, 20), "own": torch.randn(300)}
    torch.save(content, path := tmp_path / "odd.pth")
    for rank, result in enumerate(run_ranks(_load_odd, 3, args=(path,))):
        assert result.value.keys() == content.keys() - (set() if rank == 1 else {"own"})
        for name, tensor in result.value.items():
            assert torch.equal(tensor, content[name].to(tensor.dtype)), name


def _try_to_load(rank: int, path: Path, has_group: bool, is_set: bool) -> tuple[str, str]:
    from rankload import RankloadError, dist_load_into

    if not is_set:
        del os.environ["RANKLOAD_BROADCAST_OVER_GROUP"]
    if has_group:
        dist.init_process_group("gloo")
    with pytest.raises(RankloadError) as caught:
        dist_load_into(nn.Linear(3, 2), path, delivery="broadcast")
    return type(caught.value).__name__, str(caught.value)


def test_there_is_no_process_group(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), path := tmp_path / "file.pth")
    for result in run_ranks(_try_to_load, 2, args=(path, False, True)):
        name, text = result.value
        assert name == "ArgumentError" and "RANKLOAD_BROADCAST_OVER_GROUP=1: there is no process group" in text


def _try_with_one_unset(rank: int, path: Path) -> tuple[str, str]:
    return _try_to_load(rank, path, True, rank != 1)


def test_variable_is_not_set_on_all_ranks(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), path := tmp_path / "file.pth")
    for result in run_ranks(_try_with_one_unset, 3, args=(path,)):
        name, text = result.value
        assert name == "ArgumentMismatchError" and "RANKLOAD_BROADCAST_OVER_GROUP" in text


def _try_on_different_devices(rank: int, path: Path) -> tuple[str, str]:
    from rankload._load.delivery import group_stream
    from rankload._load.delivery.strategy import LoadPlan
    from rankload._load.sharing import proposal

    for module in (proposal, group_stream):
        module.device_types = lambda group: ["cpu", "cuda"]
    if rank == 1:
        LoadPlan.main_device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]
    return _try_to_load(rank, path, True, True)


def test_modules_are_on_different_kinds_of_device(tmp_path: Path) -> None:
    """Their collectives would wait for one another."""
    torch.save(nn.Linear(3, 2).state_dict(), path := tmp_path / "file.pth")
    for result in run_ranks(_try_on_different_devices, 3, args=(path,)):
        name, text = result.value
        assert name == "LoadError" and "different kinds of device" in text


def _load_where_one_wants_nothing(rank: int, path: Path, who: int) -> tuple[dict[str, torch.Tensor], str]:
    """That rank would be on another kind of device."""
    from rankload import dist_load_into
    from rankload._api import module as api_module

    _cut_finely()
    dist.init_process_group("gloo")
    module: nn.Module = nn.Linear(100, 50)
    if rank == who:
        module, api_module.own_device = nn.Module(), lambda *_: torch.device("cuda")
    report = dist_load_into(module, path, delivery="broadcast", strict=False)
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    dist.destroy_process_group()
    return tensors, report.delivery


@pytest.mark.parametrize("who", [0, 1])
def test_rank_that_wants_nothing_goes_by_the_others(tmp_path: Path, who: int) -> None:
    content = nn.Linear(100, 50).state_dict()
    torch.save(content, path := tmp_path / "file.pth")
    for rank, result in enumerate(run_ranks(_load_where_one_wants_nothing, 3, args=(path, who))):
        tensors, delivery = result.value
        assert delivery == "broadcast" and tensors.keys() == ({} if rank == who else content).keys()
        assert all(torch.equal(tensor, content[name]) for name, tensor in tensors.items())


def _load_where_one_leaves(rank: int, path: Path, leaver: int, how: str) -> tuple[str, str, float]:
    from rankload import RankloadError, dist_load_into
    from rankload._load.sharing.broadcast_group import BroadcastGroup

    _cut_finely()
    dist.init_process_group("gloo")
    start, buckets = BroadcastGroup._start, 0

    def start_or_leave(self: BroadcastGroup, content: torch.Tensor, number: int) -> Any:
        nonlocal buckets
        buckets += 1
        if rank == leaver and buckets == 100:
            os.kill(os.getpid(), getattr(signal, how))
        return start(self, content, number)

    BroadcastGroup._start = start_or_leave  # type: ignore[method-assign]
    began_at = time.monotonic()
    with pytest.raises(RankloadError) as caught:
        dist_load_into(nn.Linear(100, _ROWS), path, delivery="broadcast")
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began_at


@pytest.mark.parametrize(
    ("leaver", "how", "kind", "text"),
    [
        (0, "SIGKILL", "RankLostError", "rank 0"),
        (2, "SIGKILL", "RankLostError", "rank 2"),
        (1, "SIGSTOP", "RankLostError", "rank 1"),
        (1, "SIGTERM", "CallCancelledError", "SIGTERM"),
    ],
)
def test_rank_that_leaves_ends_the_call_on_the_others(
    tmp_path: Path, short_deadlines: float, leaver: int, how: str, kind: str, text: str
) -> None:
    torch.save(nn.Linear(100, _ROWS).state_dict(), path := tmp_path / "linear.pth")
    with start_ranks(_load_where_one_leaves, 3, args=(path, leaver, how)) as group:
        results = [group.wait_for_end(rank) for rank in range(3) if rank != leaver]
    for result in results:
        name, words, waited = result.value
        assert name == kind and text in words, words
        assert waited < 10


def test_file_that_ends_early_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    torch.save(nn.Linear(100, _ROWS).state_dict(), path := tmp_path / "linear.pth")
    for result in run_ranks(_load_truncated, 3, args=(path,)):
        name, text, total = result.value
        assert name == "LoadError" and "truncated" in text and total == 3


def _load_truncated(rank: int, path: Path) -> tuple[str, str, float]:
    """The source's disk gives less than the file has; the process group is whole afterwards."""
    from rankload import RankloadError, dist_load_into
    from rankload._load.module import checkpoint_files

    _cut_finely()
    dist.init_process_group("gloo")
    fill = checkpoint_files.fill_memory
    if rank == 0:
        checkpoint_files.fill_memory = lambda address, length, source, offset: (
            fill(address, length, source, offset) if offset < 500_000 else 0
        )
    with pytest.raises(RankloadError) as caught:
        dist_load_into(nn.Linear(100, _ROWS), path, delivery="broadcast")
    dist.all_reduce(total := torch.ones(()))
    dist.destroy_process_group()
    return type(caught.value).__name__, str(caught.value), total.item()


# --- state dicts ------------------------------------------------------------------------------------------------------


def _load_state_dict(
    rank: int, url: str, expected: Path, directory: Path, on_device: int, src: int, mmap: bool | None = None
) -> tuple[bool, dict[str, int]]:
    """The first ``on_device`` ranks take the CPU for an accelerator."""
    from rankload import dist_load_state_dict_from_url
    from rankload._load.state_dict import deferred_storages

    _cut_finely()
    moved = _count_bytes()
    deferred_storages.is_staged = lambda device: rank < on_device
    deferred_storages.BUFFER_BYTES = _BUCKET_BYTES
    become_node(rank, directory)
    dist.init_process_group("gloo")
    cache = directory / f"cache-{rank}"
    content = dist_load_state_dict_from_url(url, cache, "cpu", delivery="broadcast", src=src, mmap=mmap)
    checkpoints.assert_same(content, torch.load(expected))
    dist.barrier()
    dist.destroy_process_group()
    return cache.exists(), moved


def _parts(directory: Path, content: dict[str, torch.Tensor]) -> Path:
    for number, name in enumerate(content):
        save_file({name: content[name]}, directory / f"part{number}.safetensors")
    weight_map = {name: f"part{number}.safetensors" for number, name in enumerate(content)}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@needs_nodes
@pytest.mark.parametrize(("kind", "src"), [("zip", 0), ("training", 2), ("safetensors", 1), ("parts", 0)])
def test_a_state_dict_on_accelerators_comes_over_the_process_group(
    origin: Origin, tmp_path: Path, kind: str, src: int
) -> None:
    torch.manual_seed(5)
    base = torch.randn(60, 50)
    content = {"base": base, "turned": torch.randn(30, 40).t(), "view": base[3:20], "half": torch.randn(999).half()}
    if kind == "training":
        file = checkpoints.write_zip(tmp_path, checkpoints.training_checkpoint())
    elif kind == "zip":
        file = checkpoints.write_zip(tmp_path, content)
    else:
        content = {name: tensor.clone().contiguous() for name, tensor in content.items()}
        file = checkpoints.write_safetensors(tmp_path, content)
    url = origin.add(file.name, file.path)
    if kind == "parts":
        url = str(_parts(tmp_path, content))  # used in place
    torch.save(file.content, expected := tmp_path / "expected")

    results = run_ranks(_load_state_dict, 3, args=(url, expected, tmp_path, 3, src))

    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _tensors(file.content)}
    for rank, result in enumerate(results):
        has_cache, moved = result.value
        assert has_cache == (rank == src and kind != "parts")
        assert moved["group"] == sum(storages.values()) + 3  # connecting moves a byte for each rank
        small_bytes = sum(size for size in storages.values() if size <= 100)
        if rank == src:
            assert moved["tcp"] == 0
        elif kind != "parts":
            assert 0 < moved["tcp"] <= file.path.stat().st_size - sum(storages.values()) + small_bytes + 2000


def _tensors(content: Any) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


@needs_nodes
@pytest.mark.parametrize(
    ("kind", "on_device", "mmap"), [("zip", 2, None), ("zip", 0, None), ("legacy", 3, None), ("zip", 3, False)]
)
def test_a_state_dict_that_one_rank_wants_elsewhere_comes_over_tcp(
    origin: Origin, tmp_path: Path, kind: str, on_device: int, mmap: bool | None
) -> None:
    file = (checkpoints.write_zip if kind == "zip" else checkpoints.write_legacy)(tmp_path)
    url = origin.add(file.name, file.path)
    torch.save(file.content, expected := tmp_path / "expected")
    for rank, result in enumerate(run_ranks(_load_state_dict, 3, args=(url, expected, tmp_path, on_device, 0, mmap))):
        _, moved = result.value
        assert moved["group"] == 0 and moved["tcp"] == (file.path.stat().st_size if rank else 0)


class _Mode(TorchDispatchMode):
    """Does nothing, but a checkpoint must not be built from its index then."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _fail_to_load_state_dict(rank: int, path: Path, directory: Path, how: str) -> tuple[str, str, float]:
    from rankload import RankloadError, dist_load_state_dict_from_url
    from rankload._load.sharing.broadcast_group import BroadcastGroup
    from rankload._load.state_dict import deferred_storages

    _cut_finely()
    deferred_storages.is_staged = lambda device: True
    become_node(rank, directory)
    if how != "no group":
        dist.init_process_group("gloo")
    start, buckets = BroadcastGroup._start, 0

    def start_or_leave(self: BroadcastGroup, content: torch.Tensor, number: int) -> Any:
        nonlocal buckets
        buckets += 1
        if rank == 1 and how == "killed" and buckets == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return start(self, content, number)

    BroadcastGroup._start = start_or_leave  # type: ignore[method-assign]
    began_at = time.monotonic()
    with pytest.raises(RankloadError) as caught, _Mode() if (how, rank) == ("a mode", 2) else nullcontext():
        dist_load_state_dict_from_url(path, map_location="cpu", delivery="broadcast")
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began_at


@needs_nodes
@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("killed", "RankLostError", "rank 1"),
        ("a mode", "LoadError", "the ranks make different tensors"),
        ("no group", "ArgumentError", "RANKLOAD_BROADCAST_OVER_GROUP=1: there is no process group"),
    ],
)
def test_a_state_dict_that_cannot_come_is_an_error_on_all_ranks(
    tmp_path: Path, short_deadlines: float, how: str, kind: str, text: str
) -> None:
    torch.save(nn.Linear(100, _ROWS).state_dict(), path := tmp_path / "linear.pth")
    with start_ranks(_fail_to_load_state_dict, 3, args=(path, tmp_path, how)) as group:
        results = [group.wait_for_end(rank) for rank in range(3) if (how, rank) != ("killed", 1)]
    for result in results:
        name, words, waited = result.value
        assert name == kind and text in words, words
        assert waited < 10


# --- a real accelerator -----------------------------------------------------------------------------------------------


def _load_on_accelerator(rank: int, path: Path, directory: Path) -> tuple[bool, dict[str, int]]:
    from rankload import dist_load_state_dict_from_url

    device = torch.accelerator.current_accelerator()
    assert device is not None
    os.environ["NCCL_HOSTID"] = f"host{rank}"  # or NCCL refuses two ranks on one device, which we use for want of two
    backend = {"cuda": "nccl", "xpu": "xccl"}[device.type]
    device = torch.device(device.type, 0)
    torch.accelerator.set_device_index(device.index)
    moved = _count_bytes()
    become_node(rank, directory)
    dist.init_process_group(f"cpu:gloo,{device.type}:{backend}")
    content = dist_load_state_dict_from_url(path, map_location=str(device), delivery="broadcast")
    expected = torch.load(path, map_location=device)
    is_same = all(torch.equal(content[name], tensor) for name, tensor in expected.items())
    dist.barrier(device_ids=[device.index])
    dist.destroy_process_group()
    return is_same and {tensor.device for tensor in content.values()} == {device}, moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@needs_nodes
def test_a_state_dict_on_a_real_accelerator(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(1000, 3000), nn.BatchNorm1d(3000))
    torch.save(source.state_dict(), path := tmp_path / "file")
    for rank, result in enumerate(run_ranks(_load_on_accelerator, 2, 120, args=(path, tmp_path))):
        is_same, moved = result.value
        assert is_same and moved["group"] > 12_000_000 and (moved["tcp"] > 0) == (rank != 0)
