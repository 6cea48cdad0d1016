"""Files on network filesystems: one rank of a node reads them ahead."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import fuse
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks
from rankload._coordination.launchers import identity_from_environment
from rankload._coordination.single_process import SingleProcessChannel
from rankload._load.node import read_ahead
from rankload._types import Progress
from rankload.errors import CacheError, LoadError

pytestmark = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))

_ROWS, _COLUMNS = 6000, 1000  # 24 MB


def _read_bytes() -> int:
    """What this process has asked the system for by read(2) and its kin; mapped bytes are not counted."""
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def _load(rank: int, path: Path, nodes: list[int], directory: Path, is_module: bool) -> tuple[int, float]:
    """Loads; returns how many bytes were read for it by this rank, and the sum of all."""
    from rankload import dist_load_into, dist_load_state_dict_from_url

    become_node(nodes[rank], directory)
    before = _read_bytes()
    if is_module:
        module = nn.Linear(_COLUMNS, _ROWS, bias=False)
        dist_load_into(module, path)
        weight = module.weight.detach()
    else:
        weight = dist_load_state_dict_from_url(path)["weight"]
    read = _read_bytes() - before
    return read, weight.sum().item()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    torch.save({"weight": torch.ones(_ROWS, _COLUMNS)}, path := tmp_path / "server" / "file.pth")
    return path


def test_one_rank_reads_what_all_map(file: Path, tmp_path: Path) -> None:
    log, size = tmp_path / "reads", file.stat().st_size
    with fuse.mounted(file.parent, tmp_path / "mount", keeps_pages=True, reads_log=str(log)) as mount:
        results = [
            result.value for result in run_ranks(_load, 4, args=(mount.path / file.name, [0] * 4, tmp_path, False))
        ]
        assert all(total == _ROWS * _COLUMNS for _, total in results)
        assert sorted(read > 0.95 * size for read, _ in results) == [False, False, False, True]
        reads = [int(line.split()[1]) for line in log.read_text().splitlines()]
        assert size <= sum(reads) < 1.2 * size and sum(reads) / len(reads) > 64 << 10


def test_what_is_in_the_page_cache_is_not_read(tmp_path: Path) -> None:
    """Of a hole nothing is, until somebody reads it."""
    path = tmp_path / "file"
    with path.open("w+b") as file:
        file.truncate(20 << 20)
        assert read_ahead._absent_blocks(file.fileno()) == [0, 8 << 20, 16 << 20]
        os.pread(file.fileno(), 8 << 20, 8 << 20)
        assert read_ahead._absent_blocks(file.fileno()) == [0, 16 << 20]


def test_on_each_node_one_does(file: Path, tmp_path: Path) -> None:
    size = file.stat().st_size
    with fuse.mounted(file.parent, tmp_path / "mount") as mount:  # each open() forgets what was read
        results = [
            result.value for result in run_ranks(_load, 4, args=(mount.path / file.name, [0, 0, 1, 1], tmp_path, False))
        ]
    readers = [read > 0.95 * size for read, _ in results]
    assert readers.count(True) >= 1 and sorted(readers[:2]) != [True, True] and sorted(readers[2:]) != [True, True]


def test_replicated_modules_too(file: Path, tmp_path: Path) -> None:
    log, size = tmp_path / "reads", file.stat().st_size
    with fuse.mounted(file.parent, tmp_path / "mount", keeps_pages=True, reads_log=str(log)) as mount:
        results = [
            result.value for result in run_ranks(_load, 3, args=(mount.path / file.name, [0] * 3, tmp_path, True))
        ]
    assert all(total == _ROWS * _COLUMNS for _, total in results)
    assert sum(int(line.split()[1]) for line in log.read_text().splitlines()) < 1.2 * size
    assert sorted(round(read / size) for read, _ in results) == [1, 1, 2]


def _load_over_network(rank: int, url: str, directory: Path, log: Path, kind: str) -> tuple[bool, int]:
    """Loads a published file on two nodes; returns whether it is right, and what the server had sent before."""
    from torch.distributed.fsdp import fully_shard

    from rankload import dist_fetch, dist_load_into

    become_node(rank // 2, directory)
    dist.init_process_group("gloo")
    module: nn.Module = nn.Linear(_COLUMNS, _ROWS, bias=False)
    if kind == "sharded":
        fully_shard(module)
    path = dist_fetch(url, directory / "mount", scope="job")
    dist.barrier()
    before = _sent_bytes(log)
    dist.barrier()
    report = dist_load_into(
        module, url, directory / "mount", scope="job", delivery="read" if kind == "sharded" else "gather"
    )
    assert report.path == path
    weight = module.weight
    is_right = bool((getattr(weight, "_local_tensor", weight) == 1).all())
    dist.barrier()
    dist.destroy_process_group()
    return is_right, before


def _sent_bytes(log: Path) -> int:
    return sum(int(line.split()[1]) for line in log.read_text().splitlines())


@pytest.mark.parametrize("kind", ["sharded", "replicated"])
def test_each_byte_leaves_the_server_once_for_all_nodes(file: Path, tmp_path: Path, origin: Origin, kind: str) -> None:
    """Each node reads its shards; replicas are gathered."""
    log, size = tmp_path / "reads", file.stat().st_size
    url = origin.add("served.pth", file)
    with fuse.mounted(file.parent, tmp_path / "mount", reads_log=str(log)):  # each open() forgets what was read
        results = [result.value for result in run_ranks(_load_over_network, 4, args=(url, tmp_path, log, kind))]
    assert all(is_right for is_right, _ in results)
    assert 0.9 * size < _sent_bytes(log) - max(before for _, before in results) < 1.2 * size


class _FailedElsewhere(SingleProcessChannel):
    """Hears of another rank's failure when it reports."""

    def report(self, progress: Progress) -> None:
        raise LoadError("another's")


def test_server_that_hangs_keeps_nobody_from_hearing_of_a_failure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(read_ahead, "_is_local", lambda path: False)
    monkeypatch.setattr(read_ahead, "_absent_blocks", lambda descriptor: [0, 8 << 20])
    monkeypatch.setattr(os, "pread", lambda *arguments: answers.wait(60))
    try:
        with pytest.raises(LoadError, match="another's"):
            read_ahead.read_ahead([file], _FailedElsewhere(identity_from_environment()), 60)
        assert not answers.is_set()
    finally:
        answers.set()


def test_file_that_cannot_be_read_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(read_ahead, "_is_local", lambda path: False)
    monkeypatch.setattr(read_ahead, "_absent_blocks", lambda descriptor: [0])
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CacheError, match="Input/output error"):
        read_ahead.read_ahead([file], SingleProcessChannel(identity_from_environment()), 60)


def test_local_files_are_read_once_into_memory(file: Path, tmp_path: Path) -> None:
    results = [result.value for result in run_ranks(_load, 2, args=(file, [0, 0], tmp_path, False))]
    assert 1.0 <= sum(read for read, _ in results) / file.stat().st_size < 1.1
