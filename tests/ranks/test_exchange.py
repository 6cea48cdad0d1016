"""``scope="exchange"`` where nodes share no directory: the origin serves the file once, for every node's cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_functions import Outcome, at_store_operation, outcomes, try_to_load
from safetensors.torch import save

import rankload
from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from harness.waiting import wait_until
from rankload._fetch.exchange import neighbours, peers
from rankload._fetch.exchange.plan import units_within
from rankload._fetch.partials.journal import read_journal
from rankload.errors import CacheError, CoordinationError

CHUNK = 64 << 10


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(CHUNK))


@pytest.fixture
def big(tmp_path: Path) -> CheckpointFile:
    torch.manual_seed(3)
    content = {"w": torch.randn(700, 700), "b": torch.randn(7)}
    path = tmp_path / "origin" / "big.pth"
    path.parent.mkdir()
    torch.save(content, path)
    return CheckpointFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), content)


def load_in_own(rank: int, url: Any, root: str, ranks_per_node: int = 1, **arguments: Any) -> Outcome:
    return try_to_load(rank, url, f"{root}/node{rank // ranks_per_node}", scope="exchange", **arguments)


def run(url: Any, root: Path, world_size: int = 4, ranks_per_node: int = 1, **arguments: Any) -> list[Outcome]:
    return outcomes(run_ranks(load_in_own, world_size, args=(url, str(root), ranks_per_node), kwargs=arguments))


def published(root: Path, name: str = "big.pth") -> list[Path]:
    return sorted(root.glob(f"node*/{name}"))


def left_behind(root: Path) -> list[str]:
    return [path.name for path in root.glob("node*/**/*") if ".partial" in path.name or path.name.endswith(".lease")]


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 1), (4, 1), (6, 2)])
def test_file_is_served_once_and_verified_in_every_cache(
    origin: Origin, big: CheckpointFile, tmp_path: Path, world_size: int, ranks_per_node: int
) -> None:
    url = origin.add("big.pth", big.path)
    ended = run(url, tmp_path, world_size, ranks_per_node)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * world_size, ended
    nodes = world_size // ranks_per_node
    size = big.path.stat().st_size
    assert size <= origin.bytes_sent() <= size + nodes  # a byte for each node that asks which version there is
    paths = published(tmp_path)
    assert len(paths) == nodes and all(path.read_bytes() == big.path.read_bytes() for path in paths)
    for path in paths:
        record = json.loads((path.parent / ".rankload" / "big.pth.json").read_text())
        assert record["sha256"] == big.sha256 and record["source"] == "download"
    assert not left_behind(tmp_path)

    before = origin.request_count()
    ended = run(url, tmp_path, world_size, ranks_per_node)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * world_size
    assert origin.request_count() == before


@pytest.mark.fault(94)
def test_node_that_has_the_file_serves_it(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add("big.pth", big.path)
    assert try_to_load(0, url, str(tmp_path / "node2")).digest == digest_of(big.content)
    before = origin.bytes_sent()
    ended = run(url, tmp_path)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 4, ended
    assert origin.bytes_sent() - before <= 4 and len(published(tmp_path)) == 4


def test_directory_that_is_shared_needs_no_exchange(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add("big.pth", big.path)
    ended = run(url, tmp_path, 4, ranks_per_node=4)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 4
    assert origin.bytes_sent() == big.path.stat().st_size


@pytest.mark.fault(94)
def test_nodes_that_reach_no_origin_receive(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add("big.pth", big.path)
    proxies = {rank: {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""} for rank in (0, 2)}
    results = run_ranks(load_in_own, 4, args=(url, str(tmp_path)), rank_env=proxies)
    ended = outcomes(results)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 4, ended
    assert len(published(tmp_path)) == 4
    assert origin.bytes_sent() <= big.path.stat().st_size + 2


def test_origin_that_nobody_reaches_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    ended = run("http://127.0.0.1:9/big.pth", tmp_path)
    assert {outcome.error for outcome in ended} == {"NetworkError"}, ended


@pytest.mark.parametrize(
    "faults",
    [
        {"ranges": "ignored"},
        {"ranges": "ignored", "is_chunked": True},
        {"etag": False},
        {"etag": False, "last_modified": None},
    ],
)
def test_origin_that_cannot_be_split_is_asked_by_one_node(
    origin: Origin, big: CheckpointFile, tmp_path: Path, faults: dict[str, Any]
) -> None:
    """The others wait for that node, and get the file from it."""
    url = origin.add("big.pth", big.path, **faults)
    ended = run(url, tmp_path, 3)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended
    assert len(published(tmp_path)) == 3 and not left_behind(tmp_path)
    origin.wait_until_idle()
    assert origin.bytes_sent() <= 2 * big.path.stat().st_size  # the first node's question, and its download


def test_expected_digest_is_checked_on_every_node(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add("big.pth", big.path)
    ended = run(url, tmp_path, 3, sha256="0" * 64)
    assert {outcome.error for outcome in ended} == {"DigestMismatchError"}, ended
    assert not published(tmp_path)
    ended = run(url, tmp_path, 3, sha256=big.sha256)
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended


def test_limit_on_what_a_call_may_download(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add("big.pth", big.path)
    ended = run(url, tmp_path, 3, max_bytes=1000)
    assert {outcome.error for outcome in ended} == {"FetchError"} and "max_bytes=1000" in ended[0].text
    assert not published(tmp_path) and origin.bytes_sent() <= 3


def load_index(rank: int, url: str, root: str) -> list[float]:
    module = torch.nn.Linear(3, 2)
    rankload.dist_load_into(module, url, f"{root}/node{rank}", scope="exchange")
    return module.weight.flatten().tolist()


def test_checkpoint_in_several_files(origin: Origin, tmp_path: Path) -> None:
    parts = {
        "part-1.safetensors": {"weight": torch.arange(6.0).reshape(2, 3)},
        "part-2.safetensors": {"bias": torch.ones(2)},
    }
    for name, tensors in parts.items():
        origin.add(name, save(tensors))
    weight_map = {name: part for part, tensors in parts.items() for name in tensors}
    url = origin.add("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    results = run_ranks(load_index, 3, args=(url, str(tmp_path)))
    assert [result.value for result in results] == [[0, 1, 2, 3, 4, 5]] * 3
    for name in (*parts, "model.safetensors.index.json"):
        sent = sorted(request.body_bytes_sent for request in origin.requests(name))
        assert sent[:3] == [1, 1, 1] and len(sent) == 4, (name, sent)  # each node asks for a byte, one for the file


def test_other_job_downloads_on_one_node(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    """Its lease is respected: that node waits for its file, and the others go on without it."""
    url = origin.add("big.pth", big.path, hold_at=CHUNK)
    with start_ranks(try_to_load, 1, env="none", args=(url, str(tmp_path / "node1"))) as other:
        wait_until(lambda: list(tmp_path.glob("node1/.rankload/*.lease")), 30, "the other job has its lease")
        with start_ranks(load_in_own, 3, args=(url, str(tmp_path))) as group:
            wait_until(lambda: len(list(tmp_path.glob("node*/*.partial"))) >= 2, 30, "both jobs download")
            origin.release("big.pth")
            ended = outcomes(group.wait())
        other.wait()
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended


def missing_on(root: Path, nodes: Iterable[int], size_bytes: int) -> int:
    """Return how many bytes are in units that none of the nodes has, by the journals of their partial files."""
    held: set[int] = set()
    for node in nodes:
        for path in root.glob(f"node{node}/*.partial"):
            journal = read_journal(path)
            held |= units_within(journal.spans if journal is not None else (), size_bytes, CHUNK)
    units = set(range(-(-size_bytes // CHUNK)))
    return sum(min(CHUNK, size_bytes - unit * CHUNK) for unit in units - held)


@pytest.mark.fault(92)
@pytest.mark.parametrize("killed", [0, 1, 3])
def test_node_that_dies_ends_the_others_and_the_next_job_fetches_what_is_missing(
    origin: Origin, big: CheckpointFile, tmp_path: Path, killed: int
) -> None:
    url, size = origin.add("big.pth", big.path, bytes_per_second=100_000), big.path.stat().st_size
    with start_ranks(load_in_own, 4, args=(url, str(tmp_path))) as group:
        origin.wait_until_sent("big.pth", size // 2, 60)
        group.kill(killed)
        for rank in range(4):
            if rank != killed:
                [ended] = outcomes([group.wait_for_end(rank)])
                assert ended.error in ("RankLostError", "StoreLostError"), ended
    assert not published(tmp_path)
    shutil.rmtree(tmp_path / f"node{killed}")  # another node takes its place
    missing = missing_on(tmp_path, range(4), size)
    assert missing < size - CHUNK
    origin.wait_until_idle()
    url, before = origin.add("big.pth", big.path), origin.bytes_sent()
    ended_again = run(url, tmp_path)
    assert [outcome.digest for outcome in ended_again] == [digest_of(big.content)] * 4, ended_again
    assert origin.bytes_sent() - before <= missing + 4  # and a byte for each node's question
    assert len(published(tmp_path)) == 4 and not left_behind(tmp_path)


def load_without_partial(rank: int, url: str, root: str, moment: str) -> Outcome:
    """Rank 1's partial file is removed, as another program or an impatient job may do."""
    receive = peers.receive_in_ring

    def remove_and_receive(*arguments: Any) -> Any:
        received = receive(*arguments) if moment == "after" else None
        [partial] = Path(root, "node1").glob("*.partial")
        partial.unlink()
        if received is None:
            raise CacheError(f"cannot write {partial}", path=str(partial), errno=errno.ENOENT)
        return received

    if rank == 1:
        peers.receive_in_ring = remove_and_receive
    return load_in_own(rank, url, root)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_partial_file_that_disappears(origin: Origin, big: CheckpointFile, tmp_path: Path, moment: str) -> None:
    """While the others still count on that node, one error ends them; later the node fetches the file for itself."""
    url, size = origin.add("big.pth", big.path), big.path.stat().st_size
    ended = outcomes(run_ranks(load_without_partial, 3, args=(url, str(tmp_path), moment)))
    if moment == "before":
        assert {outcome.error for outcome in ended} == {"CacheError"} and "failed like this: 1)" in ended[0].text
        assert not published(tmp_path)
    else:
        assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3
        assert len(published(tmp_path)) == 3 and origin.bytes_sent() <= 2 * size + 3


# --- scope="auto" ----------------------------------------------------------------------------------------------------


def load_by_default(rank: int, url: str, root: str, **arguments: Any) -> Outcome:
    return try_to_load(rank, url, f"{root}/node{rank}", **arguments)


def run_by_default(url: str, root: Path, **options: Any) -> list[Outcome]:
    return outcomes(run_ranks(load_by_default, 3, nodes=3, args=(url, str(root)), **options))


@pytest.mark.fault(48)
def test_nodes_with_a_cache_on_their_own_disk_exchange_by_default(
    origin: Origin, big: CheckpointFile, tmp_path: Path
) -> None:
    url, size = origin.add("big.pth", big.path), big.path.stat().st_size
    assert [outcome.digest for outcome in run_by_default(url, tmp_path)] == [digest_of(big.content)] * 3
    assert size <= origin.bytes_sent() <= size + 3 and len(published(tmp_path)) == 3
    (tmp_path / "node0" / "big.pth").unlink()
    ended = run_by_default(url, tmp_path, kwargs={"offline": True})
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3
    assert origin.bytes_sent() <= size + 3 and len(published(tmp_path)) == 3


def load_and_tell(rank: int, url: str, root: str, scope: str, trouble: str = "") -> str:
    """Return what the report says about how the file got here."""
    if trouble and rank == 2:
        setattr(neighbours, trouble, no_way_here)
    module = torch.nn.ParameterDict({"w": torch.zeros(700, 700), "b": torch.zeros(7)})
    return rankload.dist_load_into(module, url, f"{root}/node{rank // 2}", scope=scope).fetch_reason


@pytest.mark.parametrize(
    ("scope", "trouble", "reasons"),
    [
        ("auto", "", ["exchanged by nodes, since each has a cache of its own: "] * 4),
        ("exchange", "", ["exchanged by nodes, since it was asked for: "] * 4),
        ("node", "", [f"downloaded by rank {leader} for its node" for leader in (0, 0, 2, 2)]),
        ("auto", "connect", ["downloaded for this node alone: "] * 4),
    ],
)
def test_report_says_how_the_file_got_to_each_node(
    origin: Origin, big: CheckpointFile, tmp_path: Path, scope: str, trouble: str, reasons: list[str]
) -> None:
    url, root = origin.add("big.pth", big.path), str(tmp_path)
    results = run_ranks(load_and_tell, 4, nodes=2, args=(url, root, scope, trouble))
    told = [result.value for result in results]
    assert all(text.startswith(reason) for text, reason in zip(told, reasons, strict=True)), told
    if scope in ("auto", "exchange") and not trouble:
        received = [int(text.split()[-8]) for text in told]  # "… 12 of 34 bytes came from other nodes"
        assert received[0] + received[2] == big.path.stat().st_size
    if scope == "node":
        results = run_ranks(load_and_tell, 4, nodes=2, args=(url, root, scope))
        assert {result.value for result in results} == {"in the cache"}


def load_into_memory(rank: int, url: str, root: str) -> tuple[str, bool]:
    """Return the digest of what was loaded, and whether it is mapped from the directory in memory."""
    directory = f"{root}/node{rank // 2}"
    content = rankload.dist_load_state_dict_from_url(url, directory)
    return digest_of(content), directory in Path("/proc/self/maps").read_text()


def test_memory_of_each_node_may_be_the_cache(origin: Origin, big: CheckpointFile) -> None:
    url, size = origin.add("big.pth", big.path), big.path.stat().st_size
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="rankload-test-") as root:
        results = run_ranks(load_into_memory, 4, nodes=2, args=(url, root))
        assert [result.value for result in results] == [(digest_of(big.content), True)] * 4
        assert size <= origin.bytes_sent() <= size + 2 and len(published(Path(root))) == 2


@pytest.mark.parametrize("trouble", ["connect", "Listener"])
def test_nodes_that_cannot_connect_fetch_for_themselves(
    origin: Origin, big: CheckpointFile, tmp_path: Path, trouble: str
) -> None:
    """A firewall between them, or a node on which nothing may listen. With ``scope="exchange"`` that is an error."""
    url, size = origin.add("big.pth", big.path), big.path.stat().st_size
    results = run_ranks(load_with_trouble, 3, nodes=3, args=(url, str(tmp_path), trouble))
    assert [outcome.digest for outcome in outcomes(results)] == [digest_of(big.content)] * 3
    assert origin.bytes_sent() == 3 * size + 3 and len(published(tmp_path)) == 3
    assert "each node fetches the file for itself" in results[1].stderr
    arguments = (url, str(tmp_path / "strict"), trouble, "exchange")
    ended = outcomes(run_ranks(load_with_trouble, 3, nodes=3, args=arguments))
    assert {outcome.error for outcome in ended} == {"CoordinationError"} and "no way here" in ended[0].text


def load_with_trouble(rank: int, url: str, root: str, name: str, scope: str = "auto") -> Outcome:
    if rank == 1:
        setattr(neighbours, name, no_way_here)
    return load_by_default(rank, url, root, scope=scope)


def no_way_here(*arguments: Any) -> Any:
    raise CoordinationError("no way here")


def load_until_connecting(rank: int, url: str, root: str, killed: int) -> Outcome:
    """Rank ``killed`` dies before it says how to reach it."""
    if rank != killed:
        return load_by_default(rank, url, root)
    with at_store_operation("set", "/way/", lambda: os.kill(os.getpid(), signal.SIGKILL)):
        return load_by_default(rank, url, root)


@pytest.mark.fault(92)
@pytest.mark.parametrize("killed", [0, 1])
def test_node_that_dies_while_nodes_connect_is_no_node_that_cannot_be_reached(
    origin: Origin, big: CheckpointFile, tmp_path: Path, short_deadlines: float, killed: int
) -> None:
    url = origin.add("big.pth", big.path)
    with start_ranks(load_until_connecting, 3, nodes=3, args=(url, str(tmp_path), killed)) as group:
        dead = group.wait_for_end(killed)
        results = [group.wait_for_end(rank) for rank in range(3) if rank != killed]
    assert dead.exitcode == -signal.SIGKILL
    for result, ended in zip(results, outcomes(results), strict=True):
        assert ended.error == "RankLostError" and ended.ended_at - ended.started_at < short_deadlines + 2, ended
        assert "each node fetches the file for itself" not in result.stderr


def test_offline_nodes_of_which_none_has_the_file(big: CheckpointFile, tmp_path: Path) -> None:
    ended = run_by_default("http://127.0.0.1:9/big.pth", tmp_path, kwargs={"offline": True})
    assert {outcome.error for outcome in ended} == {"OfflineError"}, ended
