"""Nodes that exchange a file and differ in what they have of it, or in what the origin tells them."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_functions import Outcome, outcomes, try_to_load
from safetensors.torch import save

import rankload
from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from harness.replies import Reply
from harness.waiting import wait_until
from rankload._fetch.exchange.plan import units_within
from rankload._fetch.partials.journal import read_journal

CHUNK = 64 << 10

#: Of a rank that reaches no origin by that name.
NO_ORIGIN = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "RANKLOAD_RETRIES": "0"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(CHUNK))


def write_checkpoint(path: Path, seed: int) -> CheckpointFile:
    """Write a checkpoint whose size does not depend on the seed."""
    torch.manual_seed(seed)
    content = {"w": torch.randn(700, 700), "b": torch.randn(7)}
    path.parent.mkdir()
    torch.save(content, path)
    return CheckpointFile(path, "", content)


@pytest.fixture
def big(tmp_path: Path) -> CheckpointFile:
    return write_checkpoint(tmp_path / "origin" / "big.pth", 3)


@pytest.fixture
def older(tmp_path: Path) -> CheckpointFile:
    return write_checkpoint(tmp_path / "older" / "big.pth", 9)


def load(rank: int, url: Any, root: str, **arguments: Any) -> Outcome:
    return try_to_load(rank, url, f"{root}/node{rank}", **arguments)


def run(url: Any, root: Path, world_size: int = 3, **options: Any) -> list[Outcome]:
    return outcomes(run_ranks(load, world_size, nodes=world_size, args=(url, str(root)), **options))


def published(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(root.glob("node*/big.pth"))]


@pytest.mark.parametrize("has_it", [0, 2])
@pytest.mark.parametrize("faults", [{"etag": False}, {"etag": False, "ranges": "ignored"}])
def test_one_node_has_the_file_and_the_origin_cannot_be_split(
    origin: Origin, big: CheckpointFile, tmp_path: Path, has_it: int, faults: dict[str, Any]
) -> None:
    """What rank 0 has, the others get; else one node fetches what rank 0 needs, for all that lack it."""
    url, size = origin.add("big.pth", big.path, **faults), big.path.stat().st_size
    assert try_to_load(0, url, str(tmp_path / f"node{has_it}")).digest == digest_of(big.content)
    origin.wait_until_idle()
    before = origin.bytes_sent()
    assert [outcome.digest for outcome in run(url, tmp_path)] == [digest_of(big.content)] * 3
    assert published(tmp_path) == [big.path.read_bytes()] * 3
    origin.wait_until_idle()
    questions = 1 if "ranges" not in faults else size  # answered with the whole file, or as much as fits in buffers
    fetched = origin.bytes_sent() - before
    assert fetched <= (2 * questions if has_it == 0 else size + 2 * questions)


@pytest.mark.parametrize("etag", [True, False])
def test_one_node_has_lost_a_file_of_several(origin: Origin, tmp_path: Path, etag: bool) -> None:
    tensors = {"b": torch.randn(200, 200), "w": torch.randn(300, 300)}
    for name, tensor in tensors.items():
        origin.add(f"{name}.safetensors", save({name: tensor}), etag=etag)
    weight_map = {name: f"{name}.safetensors" for name in tensors}
    index = json.dumps({"weight_map": weight_map}).encode()
    url = origin.add("model.safetensors.index.json", index, etag=etag)
    assert run_ranks(load_parts, 1, args=(url, str(tmp_path)))[0].value == digest_of(tensors)
    [lost] = tmp_path.glob("node0/**/w.safetensors")
    lost.unlink()
    size, before = len(save({"w": tensors["w"]})), origin.bytes_sent()
    results = run_ranks(load_parts, 3, nodes=3, args=(url, str(tmp_path)))
    assert [result.value for result in results] == [digest_of(tensors)] * 3
    assert origin.bytes_sent() - before <= size + 9  # each node asks for the version of each file


def load_parts(rank: int, url: str, root: str) -> str:
    module = torch.nn.ParameterDict({"w": torch.zeros(300, 300), "b": torch.zeros(200, 200)})
    rankload.dist_load_into(module, url, f"{root}/node{rank}")
    return digest_of({name: tensor.detach() for name, tensor in sorted(module.state_dict().items())})


def test_first_node_has_an_older_file(
    origin: Origin, big: CheckpointFile, older: CheckpointFile, tmp_path: Path
) -> None:
    """All nodes need the version that rank 0 has, and get it from there."""
    url = origin.add("big.pth", older.path)
    assert try_to_load(0, url, str(tmp_path / "node0")).digest == digest_of(older.content)
    url, before = origin.add("big.pth", big.path), origin.bytes_sent()
    assert [outcome.digest for outcome in run(url, tmp_path)] == [digest_of(older.content)] * 3
    assert origin.bytes_sent() - before <= 3


def test_first_node_reaches_no_origin_and_has_a_part_of_an_older_file(
    origin: Origin, big: CheckpointFile, older: CheckpointFile, tmp_path: Path
) -> None:
    url = origin.add("big.pth", older.path, hold_at=1_000_000)
    with start_ranks(try_to_load, 1, env="none", args=(url, str(tmp_path / "node0"))) as job:
        origin.wait_until_held("big.pth")
        wait_until(lambda: held_units(tmp_path / "node0", 1_961_733), 20, "nothing in the journal")
        job.kill(0)
        job.wait_for_end(0)
    url = origin.add("big.pth", big.path)
    ended = run(url, tmp_path, rank_env={0: NO_ORIGIN})
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended


def held_units(directory: Path, size_bytes: int) -> frozenset[int]:
    """Return the units that a dead process's partial file has."""
    paths = list(directory.glob("*.partial"))
    journal = read_journal(paths[0]) if paths else None
    return units_within(journal.spans, size_bytes, CHUNK) if journal is not None else frozenset()


def test_mirrors_have_other_validators(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    """The second node reaches only the second mirror; a digest says that both have the same file."""
    digest = base64.b64encode(bytes.fromhex(sha256_of(big.path))).decode()
    headers = {"Repr-Digest": f"sha-256=:{digest}:"}
    with Origin() as mirror:
        urls = [
            origin.add("big.pth", big.path, etag='"one"', headers=headers),
            mirror.add("big.pth", big.path, etag='"two"', headers=headers).replace("127.0.0.1", "localhost"),
        ]
        ended = run(urls, tmp_path, 2, rank_env={1: {**NO_ORIGIN, "no_proxy": "localhost"}})
        assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 2, ended
        assert origin.bytes_sent() + mirror.bytes_sent() <= big.path.stat().st_size + 2


def sha256_of(path: Path) -> str:
    from rankload._fetch.file_digest import sha256_of_file

    return sha256_of_file(path, lambda count: None)


def test_origin_that_is_busy_when_all_ask_is_tried_by_one_node(
    origin: Origin, big: CheckpointFile, tmp_path: Path
) -> None:
    url = origin.add("big.pth", big.path, *[Reply(status=503)] * 3, Reply())
    assert [outcome.digest for outcome in run(url, tmp_path)] == [digest_of(big.content)] * 3
    assert origin.bytes_sent() <= big.path.stat().st_size + 100  # the text of three refusals


def test_other_job_downloads_on_the_first_node(
    origin: Origin, big: CheckpointFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for that download, and get the file from the first node."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")  # of several, one is cut short after more was sent
    url = origin.add("big.pth", big.path, hold_at=CHUNK)
    with start_ranks(try_to_load, 1, env="none", args=(url, str(tmp_path / "node0"))) as other:
        wait_until(lambda: list(tmp_path.glob("node0/.rankload/*.lease")), 30, "the other job has no lease")
        with start_ranks(load, 3, nodes=3, args=(url, str(tmp_path))) as group:
            wait_until(lambda: len(list(tmp_path.glob("node*/*.partial"))) >= 3, 30, "the job does not begin")
            origin.release("big.pth")
            ended = outcomes(group.wait())
        other.wait()
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3
    assert origin.bytes_sent() <= big.path.stat().st_size + 3


@pytest.mark.fault(93)
def test_nodes_that_put_together_different_files_publish_none(
    origin: Origin, big: CheckpointFile, tmp_path: Path
) -> None:
    """One node's disk has changed a unit of an earlier download, which another node has as well."""
    size = big.path.stat().st_size
    url = origin.add("big.pth", big.path, bytes_per_second=150_000)
    with start_ranks(load, 3, nodes=3, args=(url, str(tmp_path))) as group:
        origin.wait_until_sent("big.pth", int(size * 0.6), 60)
        group.kill(2)
        outcomes([group.wait_for_end(rank) for rank in (0, 1)])
    shutil.rmtree(tmp_path / "node2")
    common = sorted(held_units(tmp_path / "node0", size) & held_units(tmp_path / "node1", size))
    [partial] = (tmp_path / "node0").glob("*.partial")
    with partial.open("r+b") as file:
        file.seek(common[len(common) // 2] * CHUNK + 1000)
        file.write(bytes(64))
    origin.wait_until_idle()
    url = origin.add("big.pth", big.path)

    ended = run(url, tmp_path)
    assert {outcome.error for outcome in ended} == {"DigestMismatchError"}, ended
    assert published(tmp_path) == [] and not list(tmp_path.glob("node*/*.partial"))
    assert [outcome.digest for outcome in run(url, tmp_path)] == [digest_of(big.content)] * 3
    assert published(tmp_path) == [big.path.read_bytes()] * 3


def load_and_learn_of_a_mismatch(rank: int, url: str, root: str) -> Outcome:
    """Rank 1 learns from rank 0's failure that the digests differ, before it has seen them."""
    from rankload._fetch.exchange import peers
    from rankload.errors import DigestMismatchError

    def fail(*_: Any) -> None:
        error = DigestMismatchError("different files")
        error.rank = 0
        raise error

    if rank == 1:
        peers.Share._compare = fail  # type: ignore[method-assign]
    return load(rank, url, root)


@pytest.mark.fault(93)
def test_node_that_learns_of_a_mismatch_from_another_keeps_nothing_either(
    origin: Origin, big: CheckpointFile, tmp_path: Path
) -> None:
    url = origin.add("big.pth", big.path)
    ended = outcomes(run_ranks(load_and_learn_of_a_mismatch, 2, nodes=2, args=(url, str(tmp_path))))
    assert {outcome.error for outcome in ended} == {"DigestMismatchError"}, ended
    assert not list(tmp_path.glob("node1/*.partial")) and not (tmp_path / "node1" / "big.pth").exists()


@pytest.mark.fault(74)
def test_refresh_on_a_node_that_got_the_file_from_another(
    origin: Origin, big: CheckpointFile, older: CheckpointFile, tmp_path: Path
) -> None:
    """The origin has dates, no ETags, and the new file is as long as the old one."""
    url = origin.add("big.pth", older.path, etag=False)
    assert [outcome.digest for outcome in run(url, tmp_path, 2)] == [digest_of(older.content)] * 2
    url = origin.add("big.pth", big.path, etag=False, last_modified="Thu, 22 Oct 2025 07:28:00 GMT")
    for node in range(2):
        found = try_to_load(0, url, str(tmp_path / f"node{node}"), refresh=True)
        assert found.digest == digest_of(big.content), node


def load_slowly(rank: int, url: str, root: str, slow: int) -> Outcome:
    if rank == slow:
        from rankload._fetch.origins import http_body

        read = http_body.HttpBody.read

        def read_slowly(self: http_body.HttpBody) -> bytes:
            piece = read(self)
            time.sleep(len(piece) / 60_000)
            return piece

        http_body.HttpBody.read = read_slowly  # type: ignore[method-assign]
    return load(rank, url, root, timeout=8)


def test_node_that_is_slow_is_not_taken_for_hung(
    origin: Origin, big: CheckpointFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one fetches most of the slow one's part, and says so: it also does after it has sent all it had."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    url = origin.add("big.pth", big.path)
    ended = outcomes(run_ranks(load_slowly, 2, nodes=2, args=(url, str(tmp_path), 1)))
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 2, ended


def load_with_a_busy_origin(rank: int, url: str, root: str, scope: str) -> Outcome:
    """The origin asks rank 1 to come back later than the deadline on no progress."""
    if rank == 1:
        from rankload._fetch.transfer import stream
        from rankload.errors import HTTPStatusError

        tried = stream.Stream._try
        refusals = iter([HTTPStatusError("HTTP Error 503: busy", url="u", code=503, retry_after_seconds=9.0)])

        def try_later(self: Any, span: Any, writer: Any) -> None:
            for refusal in refusals:
                raise refusal
            tried(self, span, writer)

        stream.Stream._try = try_later  # type: ignore[method-assign]
    return load(rank, url, root, timeout=4, scope=scope)


@pytest.mark.fault(9)
@pytest.mark.parametrize("scope", ["exchange", "auto"])
def test_node_that_an_origin_keeps_waiting_is_excused_by_the_others(
    origin: Origin, big: CheckpointFile, tmp_path: Path, scope: str
) -> None:
    url = origin.add("big.pth", big.path, bytes_per_second=800_000)
    ended = outcomes(run_ranks(load_with_a_busy_origin, 3, nodes=3, args=(url, str(tmp_path), scope)))
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended


def add_with_sidecar(origin: Origin, big: CheckpointFile, *replies: Reply) -> str:
    content = big.path.read_bytes()
    origin.add("big.pth.sha256", f"{hashlib.sha256(content).hexdigest()}  big.pth\n".encode(), *replies)
    return origin.add("big.pth", content)


@pytest.mark.fault(94)
def test_sidecar_of_a_node_that_reaches_no_origin(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    """It gets the digest with the file, and the next call needs no origin either."""
    url = add_with_sidecar(origin, big)
    for _ in range(2):
        ended = run(url, tmp_path, rank_env={0: NO_ORIGIN}, kwargs={"sidecar": True})
        assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended
    records = [json.loads(path.read_text()) for path in tmp_path.glob("node*/.rankload/big.pth.json")]
    assert [record["vouched_by"] for record in records] == ["sidecar"] * 3
    assert origin.request_count("big.pth.sha256") == 2


@pytest.mark.parametrize("has_it", [0, 2])
def test_node_that_has_the_file_has_its_sidecars_word(
    origin: Origin, big: CheckpointFile, tmp_path: Path, has_it: int
) -> None:
    url = add_with_sidecar(origin, big)
    assert try_to_load(0, url, str(tmp_path / f"node{has_it}"), sidecar=True).digest == digest_of(big.content)
    ended = run(url, tmp_path, kwargs={"sidecar": True, "offline": True})
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended


@pytest.mark.parametrize("has_it", [0, 2])
def test_file_that_nobody_has_compared_with_its_sidecar(
    origin: Origin, big: CheckpointFile, tmp_path: Path, has_it: int
) -> None:
    url = origin.add("big.pth", big.path)
    assert try_to_load(0, url, str(tmp_path / f"node{has_it}")).digest == digest_of(big.content)
    ended = run(url, tmp_path, kwargs={"sidecar": True, "offline": True})
    assert {outcome.error for outcome in ended} == {"OfflineError"}, ended


def test_sidecar_that_is_unavailable_to_all_nodes_once(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    """One node goes on asking, and downloads for all."""
    url = add_with_sidecar(origin, big, *[Reply(status=503)] * 3, Reply())
    ended = run(url, tmp_path, kwargs={"sidecar": True})
    assert [outcome.digest for outcome in ended] == [digest_of(big.content)] * 3, ended
    assert origin.bytes_sent("big.pth") <= big.path.stat().st_size + 3
    assert origin.request_count("big.pth.sha256") == 4


def test_nodes_without_a_sidecar(origin: Origin, big: CheckpointFile, tmp_path: Path) -> None:
    url = origin.add("big.pth", big.path)
    ended = run(url, tmp_path, kwargs={"sidecar": True})
    assert {outcome.error for outcome in ended} == {"HTTPStatusError"}, ended
    assert all("big.pth.sha256" in outcome.text for outcome in ended)
    assert published(tmp_path) == []
