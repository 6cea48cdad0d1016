"""Filesystems of several nodes: names that come late, handles that go stale, files that somebody removes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

import rankload
from harness import fuse, other_host
from harness.checkpoints import digest_of
from harness.fetch_calls import error_in, expect, fetch, files_in, left_in, load
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.replies import Reply
from rankload._cache.layout import Entry
from rankload._fetch.partials.journal import journal_path
from rankload._fetch.partials.owner import partials_of

MIB = 1 << 20
NAME = "file.bin"
LEASE_SECONDS = 1.5

needs_fuse = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))
needs_namespaces = pytest.mark.skipif(other_host.why_not() is not None, reason=str(other_host.why_not()))


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch):
    monkeypatch.setenv("RANKLOAD_LEASE_SECONDS", str(LEASE_SECONDS))
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")  # one answer to the first request would be all there is to see
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")


def load_on_node(rank, url, paths, **arguments):
    """Loads over the mount of this rank's node."""
    return load(rank, url, paths[int(os.environ["GROUP_RANK"])], **arguments)


def read_file(rank, url, cache):
    return Path(fetch(rank, url, cache)).read_bytes()


def load_after_removal(rank, url, path, times, **arguments):
    """Loads; whenever this rank sees the file that rank 0 has published, somebody has just deleted it: ``times``."""
    import rankload._fetch.fetch_once as once

    original, left = once._identity_when_opened, [times]

    def delete_and_look(file_path):
        if left[0]:
            left[0] -= 1
            file_path.unlink(missing_ok=True)
        return original(file_path)

    if rank != 0:
        once._identity_when_opened = delete_and_look
    return fetch(rank, url, path, **arguments)


# --- names that come late --------------------------------------------------------------------------------------------


@pytest.mark.fault(45)
@needs_fuse
@pytest.mark.parametrize("vices", [{"negative_seconds": 3}, {"lag_seconds": 3}, {"attribute_seconds": 3}], ids=str)
def test_file_that_other_nodes_do_not_see_at_once(origin, tmp_path, checkpoint, vices):
    """Each node has looked for it before: the answer is remembered there."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with fuse.nodes(tmp_path, 2, **vices) as nodes:
        paths = [node.path for node in nodes]
        assert not any((path / checkpoint.name).exists() for path in paths)
        results = run_ranks(load_on_node, 4, nodes=2, args=(url, paths), kwargs={"scope": "job"})
        assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1


@pytest.mark.fault(45)
@needs_fuse
def test_nodes_that_look_alike_share_one_download_though_names_come_late(origin, tmp_path, checkpoint):
    """What tells that they share the directory is a name that nobody has looked for."""
    url = origin.add(checkpoint.name, checkpoint.path)
    with fuse.nodes(tmp_path, 2, negative_seconds=3) as nodes:
        paths = [node.path for node in nodes]
        assert not any((path / checkpoint.name).exists() for path in paths)
        results = run_ranks(load_on_node, 2, nodes=2, args=(url, paths))
        assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1


@pytest.mark.fault(45)
@needs_fuse
def test_file_that_is_not_seen_in_time_is_an_error_on_every_rank(origin, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("RANKLOAD_VISIBILITY_SECONDS", "0.5")
    url = origin.add(checkpoint.name, checkpoint.path)
    with fuse.nodes(tmp_path, 2, negative_seconds=60) as nodes:
        paths = [node.path for node in nodes]
        assert not any((path / checkpoint.name).exists() for path in paths)
        results = run_ranks(load_on_node, 2, nodes=2, args=(url, paths), kwargs={"scope": "job"})
    texts = (f"rank 0 published {paths[1] / checkpoint.name}, but it does not exist here after 0.5 s", "scope='node'")
    expect([error_in(result) for result in results], rankload.CacheError, *texts, "rank 1")


# --- handles that go stale -------------------------------------------------------------------------------------------


@pytest.mark.fault(46)
@needs_fuse
@pytest.mark.parametrize(
    "vices", [{"stale_opens": 1}, {"stale_opens": 4}, {"stale_reads": 1}, {"stale_reads": 4}], ids=str
)
@pytest.mark.parametrize("arguments", [{}, {"verify": "always"}, {"mmap": False}], ids=str)
def test_stale_handle_of_a_cached_file(origin, tmp_path, checkpoint, vices, arguments):
    """Of the record, of the file when it is checked, of the file when it is loaded: opened again, nothing is lost."""
    url = origin.add(checkpoint.name, checkpoint.path)
    server = tmp_path / "server"
    rankload.dist_fetch(url, server)
    record = server / ".rankload" / f"{checkpoint.name}.json"
    before = json.loads(record.read_text())
    with fuse.mounted(server, tmp_path / "node", **vices) as node:
        [result] = run_ranks(load, 1, env="none", args=(url, node.path), kwargs=arguments)
    assert result.value == digest_of(checkpoint.content)
    assert "WARNING" not in result.stderr
    assert origin.request_count() == 1
    assert json.loads(record.read_text())["sha256"] == before["sha256"]


@pytest.mark.fault(46)
@needs_fuse
def test_stale_handle_on_a_node_that_waits(origin, tmp_path, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    server = tmp_path / "server"
    with (
        fuse.mounted(server, tmp_path / "node0") as first,
        fuse.mounted(server, tmp_path / "node1", stale_opens=3) as second,
    ):
        results = run_ranks(load_on_node, 2, nodes=2, args=(url, [first.path, second.path]), kwargs={"scope": "job"})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1


@pytest.mark.fault(46)
@needs_fuse
def test_handle_that_stays_stale_is_an_error(origin, tmp_path, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    rankload.dist_fetch(url, tmp_path / "server")
    with fuse.mounted(tmp_path / "server", tmp_path / "node", errors={"open": "ESTALE"}) as node:
        [result] = run_ranks(load, 1, env="none", args=(url, node.path))
    assert isinstance(error_in(result), rankload.RankloadError)
    assert str(node.path / checkpoint.name) in str(error_in(result))


# --- files that somebody removes -------------------------------------------------------------------------------------


@pytest.mark.fault(47)
@pytest.mark.parametrize("ranks", [2, 4])
def test_file_deleted_before_the_others_open_it(origin, cache, checkpoint, monkeypatch, ranks):
    monkeypatch.setenv("RANKLOAD_VISIBILITY_SECONDS", "0.3")
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(load_after_removal, ranks, args=(url, cache, 1))
    assert {result.value for result in results} == {str(cache / checkpoint.name)}
    assert (cache / checkpoint.name).read_bytes() == checkpoint.path.read_bytes()
    assert any("fetching it once more" in result.stderr for result in results)  # the others may find what one has
    assert origin.request_count() <= ranks  # each rank deletes it once
    assert left_in(cache) == []


def load_after_replacement(rank, url, path, content):
    """Loads; before rank 1 looks at the file that rank 0 has published, somebody puts another in its place."""
    import rankload._fetch.fetch_once as once

    original = once._identity_when_opened

    def replace_and_look(file_path):
        once._identity_when_opened = original
        other = file_path.with_name("other")
        other.write_bytes(content)
        other.replace(file_path)
        return original(file_path)

    if rank == 1:
        once._identity_when_opened = replace_and_look
    return fetch(rank, url, path)


@pytest.mark.fault(47)
@pytest.mark.parametrize("is_same", [True, False])
def test_file_replaced_before_another_rank_opens_it(origin, cache, checkpoint, is_same):
    """The same bytes in another file will do; of others of the same length the right ones are fetched once more."""
    url = origin.add(checkpoint.name, checkpoint.path)
    content = checkpoint.path.read_bytes()
    there = content if is_same else content[:-100] + bytes(100)
    results = run_ranks(load_after_replacement, 2, args=(url, cache, there))
    assert Path(results[1].value).read_bytes() == content
    assert (results[0].value == results[1].value) == is_same  # what somebody has put there stays
    assert origin.request_count() == (1 if is_same else 2)


@pytest.mark.fault(47)
def test_file_deleted_and_changed_at_the_origin_is_not_mixed_up(
    origin, cache, checkpoint, other_checkpoint, monkeypatch
):
    """All ranks have the same bytes, or all raise."""
    monkeypatch.setenv("RANKLOAD_VISIBILITY_SECONDS", "0.3")
    url = origin.add("model.pth", checkpoint.path)
    rankload.dist_fetch(url, cache)
    origin.add("model.pth", other_checkpoint.path)
    results = run_ranks(load_after_removal, 2, args=(url, cache, 1))
    expect([error_in(result) for result in results], rankload.errors.DigestMismatchError, checkpoint.sha256, "rank 1")


@pytest.mark.fault(47)
def test_file_deleted_and_gone_from_the_origin(origin, cache, checkpoint, monkeypatch):
    monkeypatch.setenv("RANKLOAD_VISIBILITY_SECONDS", "0.3")
    url = origin.add("model.pth", checkpoint.path)
    rankload.dist_fetch(url, cache)
    origin.add("model.pth", status=404)
    results = run_ranks(load_after_removal, 2, args=(url, cache, 1))
    expect([error_in(result) for result in results], rankload.errors.HTTPStatusError, url, "404", "rank 1")


@pytest.mark.fault(47)
@pytest.mark.parametrize("arguments", [{"scope": "job"}, {"offline": True}], ids=str)
def test_file_deleted_where_nobody_may_fetch_it_again(origin, cache, checkpoint, monkeypatch, arguments):
    monkeypatch.setenv("RANKLOAD_VISIBILITY_SECONDS", "0.3")
    url = origin.add("model.pth", checkpoint.path)
    rankload.dist_fetch(url, cache)
    results = run_ranks(load_after_removal, 2, args=(url, cache, 1), kwargs=arguments)
    expect([error_in(result) for result in results], rankload.CacheError, "rank 0 published", "does not exist here")
    assert origin.request_count() == 1


# --- partial files of other hosts ------------------------------------------------------------------------------------


def journal_in(cache):
    """The only partial file; the ranges in its journal, and how many of them are said to be on disk."""
    ranges, synced = [], 0
    for path in partials_of(Entry(cache / NAME)):
        with contextlib.suppress(FileNotFoundError):
            for line in map(json.loads, journal_path(path).read_text().splitlines()[1:]):
                ranges, synced = (ranges, line["synced"]) if isinstance(line, dict) else ([*ranges, line], synced)
            return path, ranges, synced
    return None, ranges, synced


def wait_until_synced(origin, cache):
    """Until some ranges are on disk, and the origin gives no more."""
    origin.wait_until_held(NAME)
    wait_until(lambda: journal_in(cache)[2] >= 2, 20, "two ranges are synced")


@pytest.fixture
def held_in_the_middle(origin, big_content):
    """The URL of a file of which a part comes."""
    return origin.add(NAME, big_content, Reply(), Reply(hold_at=MIB * 3 // 2))


@pytest.mark.fault(43)
@needs_namespaces
def test_download_of_a_dead_host_is_gone_on_with(origin, held_in_the_middle, cache, tmp_path, big_content):
    """A job that is requeued on another node: what is known to be on disk is copied, the rest comes again."""
    url = held_in_the_middle
    with other_host.start(other_host.FETCH, url, cache, directory=tmp_path) as first:
        wait_until_synced(origin, cache)
        first.kill()
    partial, ranges, synced = journal_in(cache)
    size_bytes = ranges[synced - 1][1]
    with journal_path(partial).open("a") as file:  # written, but the crash of the host has undone it
        file.write(f"[{size_bytes}, {size_bytes + MIB}]\n")
    with partial.open("r+b") as file:
        file.seek(size_bytes)
        file.write(bytes(MIB))
    sent = origin.bytes_sent()
    origin.add(NAME, big_content)
    [result] = run_ranks(read_file, 1, env="none", args=(url, cache))
    assert result.value == big_content
    assert f"resuming {partial}: it has {size_bytes} bytes" in result.stderr
    assert origin.bytes_sent() - sent == len(big_content) - size_bytes
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


@pytest.mark.fault(43)
@pytest.mark.fault(33)
@needs_namespaces
def test_frozen_host_wakes_up_after_another_has_gone_on_with_its_download(
    origin, held_in_the_middle, cache, tmp_path, big_content
):
    """Its own file was removed as a dead one's; it finds the published one, and writes into nobody's."""
    url = held_in_the_middle
    with other_host.start(other_host.FETCH, url, cache, directory=tmp_path) as frozen:
        wait_until_synced(origin, cache)
        partial, _, _ = journal_in(cache)
        frozen.stop()
        with start_ranks(read_file, 1, env="none", args=(url, cache)) as job:
            origin.wait_until_held(NAME, 2)
            assert not partial.exists()
            origin.release(NAME)
            assert job.wait()[0].value == big_content
        published = (cache / NAME).stat()
        frozen.cont()
        result = frozen.program.wait(30).check()
    assert result.stdout.strip() == str(cache / NAME)
    assert (cache / NAME).read_bytes() == big_content
    assert (cache / NAME).stat().st_ino == published.st_ino
    assert files_in(cache) == [f".rankload/{NAME}.json", NAME]


@pytest.mark.fault(46)
@needs_fuse
def test_partial_file_that_was_removed_on_another_node(origin, tmp_path, big_content):
    """NFS then answers ESTALE to whoever still writes to it; the download begins anew."""
    url = origin.add(NAME, big_content, hold_at=MIB // 2)
    with fuse.mounted(tmp_path / "server", tmp_path / "node", stale_when_removed=True) as node:
        with start_ranks(read_file, 1, env="none", args=(url, node.path)) as group:
            origin.wait_until_held(NAME)
            [partial] = (tmp_path / "server").glob("*.partial")
            partial.unlink()
            origin.release(NAME)
            assert group.wait()[0].value == big_content
        assert left_in(tmp_path / "server") == []
