"""``RANKLOAD_BROADCAST_OVER_GROUP=1``: tensors of a broadcast come over the process group, headers over TCP."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import checkpoints
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from ranks.test_into_modules import _KINDS, Net, _full

#: Rows of a linear layer that takes many buckets of `_BUCKET_BYTES`.
_ROWS = 3000
_BUCKET_BYTES = 4096


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
