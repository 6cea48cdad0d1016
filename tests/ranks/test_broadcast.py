"""`delivery="broadcast"`: one rank has the file, the others on other nodes receive."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import checkpoints, mounts
from harness.checkpoints import CheckpointFile
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from ranks.test_into_modules import _KINDS, Net, _full, _own_bytes, _steps

pytestmark = pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))


def _is_equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and found.stride() == expected.stride() and torch.equal(found, expected)
    if isinstance(expected, dict):
        return (
            type(found) is type(expected)
            and [*found] == [*expected]
            and all(_is_equal(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and all(map(_is_equal, found, expected))
    return found == expected


# --- whole checkpoints ------------------------------------------------------------------------------------------------


def _load(rank: int, url: str, directory: Path, nodes: list[int], src: int | None) -> tuple[Any, set[str], bool]:
    """Loads; returns the result, the memory that it is mapped from, and whether this rank's cache has anything."""
    from rankload import dist_load_state_dict_from_url

    become_node(nodes[rank], directory)
    cache = directory / f"cache-{rank}"
    content = dist_load_state_dict_from_url(url, cache, delivery="broadcast", src=src)
    mapped = set(re.findall(r" (\d+) +/memfd:rankload", Path("/proc/self/maps").read_text()))
    is_alone = len(os.listdir("/proc/self/fd")) < 60  # nothing leaks by the dozen
    assert is_alone
    return content, mapped, cache.exists()


_FORMATS = {
    "zip": checkpoints.write_zip,
    "legacy": checkpoints.write_legacy,
    "legacy-zip": checkpoints.write_legacy_zip,
    "training": lambda directory: checkpoints.write_zip(directory, checkpoints.training_checkpoint()),
}


@pytest.mark.parametrize(
    ("kind", "nodes", "src"),
    [
        ("zip", [0, 1], None),
        ("zip", [2, 1, 0, 1, 0], 3),
        ("legacy", [0, 1, 1], None),
        ("legacy-zip", [0, 1, 1], None),
        ("training", [0, 0, 1, 1, 2], 0),
    ],
    ids=["zip", "zip-from-3", "legacy", "legacy-zip", "training"],
)
def test_checkpoints_come_out_as_they_were_saved(
    origin: Origin, tmp_path: Path, kind: str, nodes: list[int], src: int | None
) -> None:
    file = _FORMATS[kind](tmp_path)
    url = origin.add(file.name, file.path)
    results = [result.value for result in run_ranks(_load, len(nodes), args=(url, tmp_path, nodes, src))]
    expected = torch.load(file.path, weights_only=True) if kind != "legacy-zip" else file.content
    for rank, (content, _, has_cache) in enumerate(results):
        assert _is_equal(content, expected)
        assert has_cache == (rank == (src or 0))
        if kind == "zip":
            assert content["head.weight"].data_ptr() == content["embedding.weight"].data_ptr()
    assert origin.request_count() == 1


def test_ranks_of_a_node_share_one_copy(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    url, nodes = origin.add(checkpoint.name, checkpoint.path), [0, 1, 0, 1, 1, 2]
    results = [result.value for result in run_ranks(_load, 6, args=(url, tmp_path, nodes, None))]
    memory = [mapped for _, mapped, _ in results]
    assert memory[0] == memory[2] == set()  # they have the file
    assert len(memory[1]) == 1 and memory[1] == memory[3] == memory[4]
    assert len(memory[5]) == 1 and memory[5] != memory[1]


def _load_in_group(rank: int, url: str, directory: Path) -> list[str]:
    from rankload import ArgumentError, dist_load_state_dict_from_url

    become_node(rank, directory)
    dist.init_process_group("gloo")
    group = dist.new_group([1, 2, 3])
    keys, errors = [], []
    if rank:
        for src in (2, 0, "1"):
            try:
                content = dist_load_state_dict_from_url(
                    url, directory / f"{rank}", delivery="broadcast", src=src, group=group
                )
            except ArgumentError as error:
                errors.append(str(error))
            else:
                keys = [*content]
    dist.barrier()
    dist.destroy_process_group()
    return keys + errors


def test_source_is_a_global_rank_of_the_group(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    for result in run_ranks(_load_in_group, 4, args=(url, tmp_path))[1:]:
        *keys, first, second = result.value
        assert keys == [*checkpoint.content] and "src=0" in first and "src='1'" in second
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["2"]


# --- into modules -----------------------------------------------------------------------------------------------------


def _cut_finely() -> None:
    """Lets tensors of a few hundred bytes travel as large ones do, in pieces."""
    from rankload._load.streams import buckets

    buckets.BUCKET_BYTES, buckets._SMALL_BYTES, buckets._GAP_BYTES = 1000, (100,), 0


def _load_into_each(
    rank: int, url: str, directory: Path, cases: list[tuple[str, str]], nodes: list[int]
) -> dict[str, tuple[dict[str, torch.Tensor], int, int, str, bool]]:
    from rankload import dist_load_into

    become_node(nodes[rank], directory)
    _cut_finely()
    dist.init_process_group("gloo")
    results = {}
    for kind, device in cases:
        with torch.device(device):
            net = Net()
        module = net if kind == "plain" else _KINDS[kind](net)
        report = dist_load_into(module, url, directory / f"cache-{rank}", delivery="broadcast")
        assert report.missing_keys == report.unexpected_keys == [], (kind, device)
        assert net.head.weight is net.embedding.weight, (kind, device)
        facts = report.bytes_read, _own_bytes(net), report.delivery, report.path is not None
        results[f"{kind} on {device}"] = _full(net), *facts
    dist.barrier()
    dist.destroy_process_group()
    return results


_CASES = {
    "zip": [
        *((kind, "cpu") for kind in ("plain", *_KINDS)),
        *((kind, "meta") for kind in ("plain", "fsdp", "hybrid")),
    ],
    "safetensors": [(kind, "cpu") for kind in ("plain", "fsdp", "by-hand")],
}


@pytest.mark.parametrize("file_format", _CASES)
def test_each_rank_takes_out_its_own_part(origin: Origin, tmp_path: Path, file_format: str) -> None:
    torch.manual_seed(3)
    content = Net().state_dict()
    if file_format == "safetensors":
        del content["head.weight"]
    write = checkpoints.write_zip if file_format == "zip" else checkpoints.write_safetensors
    file = write(tmp_path, content)
    nodes = [0, 1, 1, 2]
    cases = _CASES[file_format]
    results = run_ranks(_load_into_each, 4, args=(origin.add(file.name, file.path), tmp_path, cases, nodes))
    for rank, result in enumerate(results):
        assert len(result.value) == len(cases)
        for case, (tensors, bytes_read, own_bytes, delivery, has_file) in result.value.items():
            for name, tensor in content.items():
                assert torch.equal(tensors[name], tensor), (case, name)
            assert bytes_read == own_bytes and delivery == "broadcast" and has_file == (rank == 0), case
    assert origin.request_count() == 1


class Odd(nn.Module):
    """Parameters of other dtypes and layouts than the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        self.converted = nn.Parameter(torch.zeros(30, 41, dtype=torch.float64))
        self.transposed = nn.Parameter(torch.zeros(50, 20))
        self.into_transposed = nn.Parameter(torch.zeros(20, 50).t())
        self.channels_last = nn.Parameter(torch.zeros(4, 6, 5, 7))
        self.expanded = nn.Parameter(torch.zeros(300, 4))
        self.register_buffer("flags", torch.zeros(700, dtype=torch.bool))
        self.register_buffer("scalar", torch.zeros(()))


def _odd_content() -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(11)
    return OrderedDict(
        flags=torch.rand(700) > 0.5,
        converted=torch.randn(30, 41).to(torch.bfloat16),
        transposed=torch.randn(20, 50).t(),
        into_transposed=torch.randn(50, 20),
        channels_last=torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last),
        expanded=torch.randn(300, 1).expand(300, 4),
        scalar=torch.tensor(2.5),
    )


def _load_odd(rank: int, path: Path, directory: Path) -> dict[str, torch.Tensor]:
    from rankload import adapt, dist_load_into

    become_node(rank, directory)
    _cut_finely()
    module = Odd()
    with torch.device("meta"):  # where scripts make modules: what a load makes for itself is on the CPU all the same
        dist_load_into(module, path, delivery="broadcast", adapt=adapt.to_dtype(torch.float16))
    return module.state_dict()


def test_other_dtypes_and_layouts(tmp_path: Path) -> None:
    torch.save(content := _odd_content(), tmp_path / "odd.pth")
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in content.items()}
    (expected := Odd()).load_state_dict(halved)
    for result in run_ranks(_load_odd, 3, args=(tmp_path / "odd.pth", tmp_path)):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(result.value[name], tensor), name


class Converting(nn.Linear):
    """Has a hook that computes with what is loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *others)


def _load_converting(rank: int, path: Path, directory: Path, how: str) -> dict[str, torch.Tensor]:
    from rankload import dist_load_into

    become_node(rank, directory)
    _cut_finely()
    own = {"adapt": lambda content: {name: tensor + 0 for name, tensor in content.items()}} if how == "adapt" else {}
    dist_load_into(module := (Converting if how == "hook" else nn.Linear)(40, 40), path, delivery="broadcast", **own)
    return module.state_dict()


@pytest.mark.parametrize("how", ["hook", "adapt", "legacy-zip"])
def test_where_tensors_must_be_seen_the_whole_file_comes(tmp_path: Path, how: str) -> None:
    torch.manual_seed(1)
    content = nn.Linear(40, 40).state_dict()
    write = checkpoints.write_legacy_zip if how == "legacy-zip" else checkpoints.write_zip
    file = write(tmp_path, content)
    for result in run_ranks(_load_converting, 3, args=(file.path, tmp_path, how)):
        assert torch.equal(result.value["weight"], content["weight"] * (2 if how == "hook" else 1))


def _go_on_training(rank: int, path: Path, directory: Path) -> tuple[list[float], int]:
    from rankload import adapt, dist_load_into

    become_node(rank, directory)
    _cut_finely()
    dist.init_process_group("gloo")
    torch.manual_seed(5)
    module = _KINDS["fsdp"](Net())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    dist_load_into((module, optimizer), path, delivery="broadcast")
    losses = _steps(module, optimizer, 2)
    report = dist_load_into(module, path, delivery="broadcast", adapt=adapt.unwrap("model"))  # not the optimizer's
    dist.barrier()
    dist.destroy_process_group()
    return losses, report.bytes_read


def test_a_training_checkpoint_into_fsdp_and_its_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    _steps(net, optimizer, 2)
    path = tmp_path / "training.pth"
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    expected = _steps(net, optimizer, 2)
    results = run_ranks(_go_on_training, 3, args=(path, tmp_path))
    for result in results:
        assert result.value[0] == pytest.approx(expected, rel=1e-4)
    parts = [result.value[1] for result in results]
    assert sum(parts) == pytest.approx(_own_bytes(net), rel=0.3)


def _load_stages(rank: int, path: Path, directory: Path) -> dict[str, torch.Tensor]:
    """As pipeline stages: each rank has another part of the model."""
    from rankload import dist_load_into

    become_node(rank, directory)
    _cut_finely()
    module = nn.ModuleDict({f"stage{rank}": nn.Linear(40, 40)})
    report = dist_load_into(module, path, delivery="broadcast", strict=False)
    assert not report.missing_keys and len(report.unexpected_keys) == 4
    return module.state_dict()


def test_ranks_that_want_other_tensors_than_the_source(tmp_path: Path) -> None:
    torch.manual_seed(1)
    content = nn.ModuleDict({f"stage{rank}": nn.Linear(40, 40) for rank in range(3)}).state_dict()
    torch.save(content, tmp_path / "stages.pth")
    for result in run_ranks(_load_stages, 3, args=(tmp_path / "stages.pth", tmp_path)):
        assert all(torch.equal(tensor, content[name]) for name, tensor in result.value.items())


_TIMEOUT_SECONDS = 2
_STILL_SECONDS = _TIMEOUT_SECONDS + 5  # after which others take a rank for stuck


def _load_from_a_busy_source(rank: int, path: Path, directory: Path) -> dict[str, torch.Tensor]:
    from rankload import dist_load_into

    become_node(rank, directory)

    def adapt(content: Any) -> Any:
        while rank == 0 and time.thread_time() < _STILL_SECONDS + 2:
            pass
        return content

    dist_load_into(module := nn.Linear(40, 40), path, delivery="broadcast", adapt=adapt, timeout=_TIMEOUT_SECONDS)
    return module.state_dict()


def test_source_that_computes_is_no_hung_network(tmp_path: Path) -> None:
    torch.save(content := nn.Linear(40, 40).state_dict(), tmp_path / "linear.pth")
    for result in run_ranks(_load_from_a_busy_source, 3, args=(tmp_path / "linear.pth", tmp_path)):
        assert torch.equal(result.value["weight"], content["weight"])


# --- failures ---------------------------------------------------------------------------------------------------------


def _load_where_one_differs(rank: int, path: Path, directory: Path) -> tuple[str, bool]:
    from rankload import LoadError, dist_load_into

    become_node(rank, directory)
    _cut_finely()
    net = Net()
    if rank == 2:
        net.blocks[1].up = nn.Linear(37, 60)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(LoadError) as caught:
        dist_load_into(net, path, delivery="broadcast")
    return str(caught.value), all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_one_rank_whose_module_differs_keeps_all_from_writing(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    for result in run_ranks(_load_where_one_differs, 4, args=(tmp_path / "net.pth", tmp_path)):
        text, is_untouched = result.value
        assert "blocks.1.up.weight" in text and "rank 2" in text and is_untouched


def _refuse_on_a_receiver(rank: int, path: Path, directory: Path, is_module: bool) -> tuple[str, str]:
    from rankload import dist_load_into, dist_load_state_dict_from_url
    from rankload.errors import UnsafePickleError

    become_node(rank, directory)
    options = {"delivery": "broadcast", "weights_only": rank == 1, "adapt": dict}
    with pytest.raises(UnsafePickleError) as caught:
        if is_module:
            dist_load_into(nn.Linear(4, 4), path, strict=False, **options)
        else:
            dist_load_state_dict_from_url(path, **options)
    return str(caught.value), caught.value.fields["path"]


@pytest.mark.parametrize("is_module", [True, False])
def test_receivers_name_the_sources_file(tmp_path: Path, is_module: bool) -> None:
    path = tmp_path / "linear.pth"
    torch.save({**nn.Linear(4, 4).state_dict(), "path": path}, path)
    for result in run_ranks(_refuse_on_a_receiver, 2, args=(path, tmp_path, is_module)):
        text, field = result.value
        assert text.startswith(f"{path}: ") and field == str(path) and "[rank 1 " in text


_MEGABYTES = 40


def _load_where_one_leaves(
    rank: int, path: Path, directory: Path, leaver: int, how: str, is_module: bool
) -> tuple[str, str, float]:
    """One rank leaves in the middle of the stream; the others return their error, and how long they had to wait."""
    from rankload import RankloadError, dist_load_into, dist_load_state_dict_from_url
    from rankload._relay.relay import Relay

    become_node(rank, directory)
    note = Relay._note

    def note_and_leave(self: Relay, count: int) -> None:
        note(self, count)
        if rank == leaver and self.bytes_passed > _MEGABYTES << 19:
            if how == "error":
                raise ValueError("the leaver's own")
            os.kill(os.getpid(), getattr(signal, how))

    Relay._note = note_and_leave
    began_at = time.monotonic()
    with pytest.raises(RankloadError) as caught:
        if is_module:
            module = nn.Linear(1 << 10, _MEGABYTES << 8, bias=False)
            dist_load_into(module, path, delivery="broadcast")
        else:
            dist_load_state_dict_from_url(path, delivery="broadcast")
    return type(caught.value).__name__, str(caught.value), time.monotonic() - began_at


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.pth"
    torch.save({"weight": torch.ones(_MEGABYTES << 8, 1 << 10)}, path)
    return path


@pytest.mark.parametrize(
    ("is_module", "leaver", "how", "kind", "text", "seconds"),
    [
        (False, 0, "SIGKILL", "RankLostError", "rank 0", 8),
        (False, 2, "SIGKILL", "RankLostError", "rank 2", 8),
        (False, 3, "SIGKILL", "RankLostError", "rank 3", 8),
        (False, 2, "SIGSTOP", "RankLostError", "rank 2", 10),
        (False, 2, "error", "RankFailedError", "the leaver's own", 8),
        (False, 2, "SIGTERM", "CallCancelledError", "SIGTERM", 8),
        (True, 0, "SIGSTOP", "RankLostError", "rank 0", 10),
        (True, 2, "SIGKILL", "RankLostError", "rank 2", 8),
        (True, 2, "error", "RankFailedError", "the leaver's own", 8),
    ],
)
def test_rank_that_leaves_in_the_middle(
    large_file: Path, tmp_path: Path, short_deadlines: float, is_module: bool,
    leaver: int, how: str, kind: str, text: str, seconds: float,
) -> None:  # fmt: skip
    arguments = (large_file, tmp_path, leaver, how, is_module)
    with start_ranks(_load_where_one_leaves, 4, args=arguments) as group:
        others = [rank for rank in range(4) if rank != leaver]
        results = {rank: group.wait_for_end(rank) for rank in others}
    for rank in others:
        name, words, waited = results[rank].value
        assert name == kind and text in words, words
        assert waited < seconds
