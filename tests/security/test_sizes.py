"""A length that an origin announces, or does not, takes no more room than the caller allows."""

from __future__ import annotations

import json
import resource
import sys

import pytest
import torch
from safetensors.torch import save

import rankload
from harness import disks
from harness.fetch_calls import errors_of, expect, fetch, fetch_and_mark, files_in, load
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.raw_origin import Connection, RawOrigin
from harness.scripts import run_program
from rankload._formats.read_index import read_index
from rankload._load.values.tensors import read_tensor

MIB = 1 << 20
LIMIT = 100_000

needs_mounts = pytest.mark.skipif(disks.why_not() is not None, reason=str(disks.why_not()))


# --- preallocation -------------------------------------------------------------------------------------------------


@pytest.mark.fault(69)
@needs_mounts
def test_announced_length_alone_takes_little_of_the_disk(tmp_path):
    size_bytes, announced_bytes = 1024 * MIB, 1000 * MIB

    def reply(connection: Connection) -> None:
        connection.read_request()
        head = f'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: {announced_bytes}\r\n\r\n'
        connection.sendall(head.encode() + bytes(MIB))
        connection.trickle(b"a")

    with (
        disks.tmpfs(tmp_path / "cache", size_bytes=size_bytes) as cache,
        RawOrigin(reply) as origin,
        start_ranks(fetch_and_mark, 1, env="none", args=(origin.url("file.bin"), cache)) as group,
    ):
        [partial] = wait_until(lambda: list(cache.glob("*.partial")), 30, "a partial file")
        wait_until(lambda: partial.stat().st_size >= MIB, 30, "the first bytes")
        assert partial.stat().st_blocks * 512 <= 64 * MIB
        group.kill(0)


# --- max_bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(69)
def test_announced_length_is_refused_before_the_first_byte_on_every_rank(origin, cache):
    url = origin.add("file.bin", bytes(LIMIT + 1), hold_at=1)
    errors = errors_of(fetch, url, cache, max_bytes=LIMIT)
    expect(errors, rankload.FetchError, url, f"has {LIMIT + 1} bytes", f"max_bytes={LIMIT}", "RANKLOAD_MAX_BYTES")
    assert files_in(cache) == []
    assert origin.request_count() == 1
    assert errors[0].max_bytes == LIMIT and errors[0].size_bytes == LIMIT + 1


@pytest.mark.fault(69)
@pytest.mark.parametrize("reply", [{"is_chunked": True}, {"content_length": False}])
def test_body_without_a_length_is_cut_off_at_the_limit(origin, cache, big_content, reply):
    url = origin.add("file.bin", big_content, ranges="ignored", **reply)
    with pytest.raises(rankload.FetchError, match=f"max_bytes={LIMIT}") as caught:
        rankload.dist_fetch(url, cache, max_bytes=LIMIT, progress=False)
    assert caught.value.size_bytes is None
    assert files_in(cache) == []
    assert origin.request_count() == 1


def test_no_mirror_is_asked(origin, cache):
    first, mirror = origin.add("file.bin", bytes(LIMIT + 1)), origin.add("mirror.bin", bytes(10))
    with pytest.raises(rankload.FetchError, match="max_bytes"):
        rankload.dist_fetch([first, mirror], cache, max_bytes=LIMIT, progress=False)
    assert origin.request_count("mirror.bin") == 0


def test_file_of_exactly_the_limit(origin, cache):
    url = origin.add("file.bin", bytes(LIMIT))
    assert rankload.dist_fetch(url, cache, max_bytes=LIMIT, progress=False).stat().st_size == LIMIT
    # what is cached does not count
    assert rankload.dist_fetch(url, cache, max_bytes=1, progress=False).stat().st_size == LIMIT
    assert origin.request_count() == 1


def test_environment_sets_it_and_the_argument_wins(origin, cache, monkeypatch):
    monkeypatch.setenv("RANKLOAD_MAX_BYTES", "10")
    url = origin.add("file.bin", bytes(LIMIT))
    with pytest.raises(rankload.FetchError, match="max_bytes=10 "):
        rankload.dist_fetch(url, cache, progress=False)
    with pytest.raises(rankload.FetchError, match="max_bytes=10 "):
        rankload.hub.download_url_to_file(url, str(cache / "other.bin"), progress=False)
    assert rankload.dist_fetch(url, cache, max_bytes=LIMIT, progress=False).exists()


def test_files_of_one_index_share_it(origin, cache):
    parts = {name: save({name: torch.ones(10_000)}) for name in ("a", "b")}
    for name, content in parts.items():
        origin.add(f"repo/{name}.safetensors", content)
    index = json.dumps({"weight_map": {name: f"{name}.safetensors" for name in parts}}).encode()
    url = origin.add("repo/model.safetensors.index.json", index)
    total = len(index) + sum(map(len, parts.values()))
    with pytest.raises(rankload.FetchError, match=f"b.safetensors.* after {total - len(parts['b'])} bytes of other"):
        rankload.dist_load_state_dict_from_url(url, cache, max_bytes=total - 1, progress=False)
    rankload.dist_load_state_dict_from_url(url, cache / "other", max_bytes=total, progress=False)


def test_loading_calls_take_it(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    errors = errors_of(load, url, cache, max_bytes=checkpoint.size - 1)
    expect(errors, rankload.FetchError, "max_bytes=")
    with pytest.raises(rankload.FetchError, match="max_bytes="):
        rankload.dist_load_into(torch.nn.Linear(1, 1), url, cache, max_bytes=1, progress=False)
    assert files_in(cache) == []


def test_command_line_takes_it(origin, cache):
    url = origin.add("file.bin", bytes(LIMIT))
    command = [sys.executable, "-m", "rankload", "prefetch", url, "--any-file", "--model-dir", cache, "--max-bytes"]
    refused = run_program([*command, "10"])
    assert refused.exitcode == 1 and "--max-bytes 10 " in refused.stderr
    run_program([*command, str(LIMIT)]).check()


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, True, "10"])
def test_value_that_cannot_be(origin, cache, max_bytes):
    url = origin.add("file.bin", b"content")
    with pytest.raises(rankload.ArgumentError, match="expected a positive whole number of bytes"):
        rankload.dist_fetch(url, cache, max_bytes=max_bytes)
    assert origin.request_count() == 0


class Boundless:
    """A file at an origin that claims to be longer than any memory."""

    size_bytes = 1 << 61

    def read(self, length: int, offset: int) -> bytes:
        header = b'{"a": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (1 << 60, 1 << 60)
        return (len(header).to_bytes(8, "little") + header)[offset : offset + length]


def test_tensor_that_no_memory_holds_is_an_error_of_ours():
    source = Boundless()
    source.size_bytes = (1 << 60) + len(source.read(1000, 0))
    [entry] = read_index(source, "a", lambda name: source, is_remote=True).tensors.values()
    with pytest.raises(rankload.LoadError, match="not enough memory for tensor 'a'"):
        read_tensor(source, entry, "little", "a")


def test_file_that_no_address_space_holds_is_an_error_of_ours(tmp_path):
    """It has holes. Mapping it takes more addresses than the process may have."""
    header = b'{"a": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (1 << 40, 1 << 40)
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + (1 << 40))
    [result] = run_ranks(map_in_little_space, 1, env="none", args=(str(tmp_path / "large.safetensors"),))
    assert "cannot be mapped" in result.value


def map_in_little_space(rank, path):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, 1 << 39))
    module = torch.nn.Module()
    module.register_buffer("a", torch.empty(1 << 40, dtype=torch.uint8, device="meta"))
    with pytest.raises(rankload.LoadError) as caught:
        rankload.dist_load_into(module, path, assign=True, mmap=True, progress=False)
    return str(caught.value)
