"""No read from an origin outlives its deadlines, whatever the origin sends, and no thread or connection stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import rankload
import rankload.hub
from harness.fetch_calls import errors_of, expect, fetch, fetch_and_mark, files_in
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks, wait_until
from harness.raw_origin import Connection, RawOrigin
from harness.replies import Reply
from rankload._fetch import hub_listing

MIB = 1 << 20

#: The deadline on no progress, and what a call may take in all on a busy machine.
DEADLINE_SECONDS = 0.5
IN_ALL_SECONDS = 5


def endless_interim_responses(connection: Connection) -> None:
    connection.read_request()
    connection.trickle(b"HTTP/1.1 100 Continue\r\n\r\n")


def endless_header(connection: Connection) -> None:
    connection.read_request()
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Header: ")
    connection.trickle(b"a")


def trickling_body(connection: Connection) -> None:
    connection.read_request()
    connection.sendall(b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-32767/100000\r\nContent-Length: 32768\r\n\r\n")
    connection.trickle(b"a")


def trickling_body_of_any_length(connection: Connection) -> None:
    connection.read_request()
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    connection.trickle(b"a")


def endless_redirects(connection: Connection) -> None:
    """Each hop comes quickly; the last one never ends."""
    if "/last" in connection.read_request():
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Header: ")
        connection.trickle(b"a")
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /last\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def endless_handshake(connection: Connection) -> None:
    """The beginning of a long TLS record, and then one byte after another."""
    connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
    connection.trickle(b"\x03")


REPLIES = [
    endless_interim_responses,
    endless_header,
    trickling_body,
    trickling_body_of_any_length,
    endless_redirects,
    endless_handshake,
]


@pytest.fixture(autouse=True)
def short_deadline(monkeypatch):
    monkeypatch.setenv("RANKLOAD_PROGRESS_SECONDS", str(DEADLINE_SECONDS))


def fetch_in_time(rank, url, model_dir, **arguments):
    """As fetch; asserts how long the call takes, whatever the start of the ranks takes on a busy machine."""
    began_at = time.monotonic()
    try:
        return fetch(rank, url, model_dir, **arguments)
    finally:
        assert time.monotonic() - began_at < 2 * IN_ALL_SECONDS


def expect_nothing_left(origin):
    """No connection is open, and no thread of ours waits for one."""
    origin.wait_until_idle()
    ours = ("rankload-read", "rankload-stream")
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith(ours)], 10, "all threads ended")


@pytest.mark.fault(64)
@pytest.mark.parametrize("reply", REPLIES)
def test_opened_checkpoint(reply):
    scheme = "https" if reply is endless_handshake else "http"
    with RawOrigin(reply) as origin:
        began_at = time.monotonic()
        with pytest.raises(
            rankload.errors.FetchTimeoutError, match=f"{scheme}://127.0.0.1.*(not a byte came|too slow)"
        ):
            rankload.open_checkpoint(origin.url("model.safetensors", scheme))
        assert time.monotonic() - began_at < IN_ALL_SECONDS
        expect_nothing_left(origin)


@pytest.mark.parametrize("reply", [endless_interim_responses, endless_header, endless_redirects, endless_handshake])
def test_transfer_leaves_no_connection_in_the_header_phase(reply, cache):
    scheme = "https" if reply is endless_handshake else "http"
    with RawOrigin(reply) as origin:
        with pytest.raises(rankload.errors.FetchTimeoutError):
            rankload.dist_fetch(origin.url("file.bin", scheme), cache, progress=False)
        expect_nothing_left(origin)
    assert files_in(cache) == []


@pytest.mark.fault(64)
@pytest.mark.parametrize("reply", [endless_interim_responses, endless_header, trickling_body_of_any_length])
def test_sidecar_is_the_same_error_on_all_ranks(reply, cache):
    with RawOrigin(reply) as origin:
        url = origin.url("file.bin")
        errors = errors_of(fetch_in_time, url, cache, sidecar=True, timeout=1)
        expect(errors, rankload.errors.FetchTimeoutError, f"{url}.sha256", "[rank 0 on ")
        origin.wait_until_idle()
    assert files_in(cache) == []


def error_of_the_hub(rank, call, url):
    """The error of a call that the Hub does not answer; asserts how long the call takes."""
    import huggingface_hub.hf_api  # noqa: F401 - takes longer than the deadline

    began_at = time.monotonic()
    with pytest.raises(rankload.FetchError) as caught:
        rankload.open_checkpoint(url) if call == "open" else rankload.dist_fetch(url, progress=False)
    assert time.monotonic() - began_at < 2 * IN_ALL_SECONDS
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("call", "path", "ranks"), [("fetch", "", 2), ("fetch", "/model.safetensors", 2), ("open", "", 1)]
)
@pytest.mark.parametrize("reply", [endless_header, trickling_body_of_any_length])
def test_list_of_a_repository(reply, call, path, ranks, tmp_path):
    with RawOrigin(reply) as origin:
        environment = {
            "HF_ENDPOINT": origin.url("").rstrip("/"),
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        args, rank_env = (call, f"hf://org/tiny{path}"), dict.fromkeys(range(ranks), environment)
        for result in run_ranks(error_of_the_hub, ranks, args=args, rank_env=rank_env, timeout_seconds=60):
            assert result.value.startswith("FetchTimeoutError: hf://org/tiny: "), result.describe()


@pytest.mark.parametrize("is_told", [False, True])
def test_repository_is_fetched_within_the_deadline_of_the_call(is_told, tmp_path, monkeypatch):
    """Whoever is on the way to GitHub answers, but never to the end: a proxy here, so that nobody else is asked."""
    monkeypatch.setenv("RANKLOAD_PROGRESS_SECONDS", "60" if is_told else "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with RawOrigin(endless_header) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url(""))
        began_at = time.monotonic()
        with pytest.raises(rankload.errors.FetchTimeoutError, match="github"):
            rankload.dist_hub_load("a/b", "model", trust_repo=True, timeout=1 if is_told else None)
        assert time.monotonic() - began_at < IN_ALL_SECONDS


def test_reader_of_a_sidecar_hears_of_other_ranks(cache, monkeypatch):
    """The deadline is far away: it is another rank's failure that ends the read."""
    monkeypatch.setenv("RANKLOAD_REPORT_SECONDS", "0.2")
    with (
        RawOrigin(endless_interim_responses) as origin,
        start_ranks(
            fetch_and_mark, 2, args=(origin.url("file.bin"), cache), kwargs={"sidecar": True, "timeout": 300}
        ) as group,
    ):
        origin.wait_for_connections(1)
        wait_until(lambda: "waiting for rank 0" in group.stderr(1), 30, "rank 1 waits for the reader")
        group.kill(1, signal.SIGTERM)
        result = group.wait_for_end(0, 20)
        assert result.exception is not None and "SIGTERM" in str(result.exception.original), result.describe()


def test_failure_of_one_read_leaves_the_checkpoint_usable(monkeypatch):
    """The connection that was broken off is not used again."""
    content = save({"a": torch.ones(100_000), "b": torch.zeros(100_000)})
    with Origin() as origin:
        url = origin.add("model.safetensors", content, Reply(), Reply(hold_at=10), Reply())
        with rankload.open_checkpoint(url) as checkpoint:
            with pytest.raises(rankload.errors.FetchTimeoutError):
                checkpoint["b"]
            assert torch.equal(checkpoint["b"], torch.zeros(100_000))


def test_large_tensor_over_a_slow_link_may_take_longer_than_the_deadline(origin, monkeypatch):
    monkeypatch.setenv("RANKLOAD_PROGRESS_SECONDS", "1")
    content = {"a": torch.arange(300_000)}
    url = origin.add("model.safetensors", save(content), bytes_per_second=1_000_000)
    with rankload.open_checkpoint(url) as checkpoint:
        began_at = time.monotonic()
        assert torch.equal(checkpoint["a"], content["a"])
        assert time.monotonic() - began_at > 1.5


@pytest.mark.fault(64)
@pytest.mark.parametrize("length", [b"", b"Content-Length: 999999999999\r\n"], ids=["no length", "false length"])
def test_endless_sidecar_is_read_no_further_than_its_limit(length, cache):
    def endless(connection):
        connection.read_request()
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
        while True:
            connection.sendall(b" " * 65536)

    with RawOrigin(endless) as origin:
        with pytest.raises(rankload.FetchError, match="holds no SHA-256"):
            rankload.dist_fetch(origin.url("file.bin"), cache, sidecar=True, progress=False)
        origin.wait_until_idle()
        assert len(origin.connections) == 1
        assert origin.sent_bytes < 32 * MIB  # what fits into the buffers of the connection


@pytest.mark.fault(64)
def test_endless_list_of_a_repository_is_read_no_further_than_its_limit(monkeypatch):
    from huggingface_hub import constants

    def endless(connection):
        connection.read_request()
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
        while True:
            connection.sendall(b" " * 65536)

    monkeypatch.setattr(hub_listing, "_MAX_BYTES", MIB)
    with RawOrigin(endless) as origin:
        monkeypatch.setattr(constants, "ENDPOINT", origin.url("").rstrip("/"))
        with pytest.raises(rankload.FetchError, match=f"the Hub's list of files has {MIB} bytes or more"):
            rankload.open_checkpoint("hf://org/tiny")
        origin.wait_until_idle()
        assert len(origin.connections) == 1
        assert origin.sent_bytes < 32 * MIB


@pytest.mark.parametrize("call", ["fetch", "open"])
def test_redirect_with_an_endless_body_is_followed_without_reading_it(origin, cache, call):
    content = save({"a": torch.ones(1000)})
    target = origin.add("model.safetensors", content)

    def endless(connection):
        connection.read_request()
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode())
        while True:
            connection.sendall(b"x" * 65536)

    with RawOrigin(endless) as redirecting:
        url = redirecting.url("model.safetensors")
        if call == "fetch":
            assert rankload.dist_fetch(url, cache, progress=False).read_bytes() == content
        else:
            rankload.open_checkpoint(url).close()
        redirecting.wait_until_idle()
        assert redirecting.sent_bytes < 32 * MIB


def test_redirect_within_a_server_keeps_the_connection(cache):
    """The body of a redirect is read if it is short."""

    def reply(connection):
        if "/old" in connection.read_request():
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /new\r\nContent-Length: 5\r\n\r\nmoved")
            connection.read_request()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfile")

    with RawOrigin(reply) as origin:
        assert rankload.dist_fetch(origin.url("old"), cache, progress=False).read_bytes() == b"file"
        assert len(origin.connections) == 1


def test_range_that_does_not_end_is_cut_off():
    content = save({"a": torch.ones(1000)})

    def endless(connection):
        connection.read_request()
        content_range = f"bytes 0-{len(content) - 1}/{len(content)}"
        connection.sendall(f"HTTP/1.1 206 Partial\r\nContent-Range: {content_range}\r\n\r\n".encode() + content)
        while True:
            connection.sendall(b"x" * 65536)

    with RawOrigin(endless) as origin, rankload.open_checkpoint(origin.url("model.safetensors")) as checkpoint:
        assert torch.equal(checkpoint["a"], torch.ones(1000))
        origin.wait_until_idle()
        assert origin.sent_bytes < 32 * MIB


def test_long_body_that_stalls_is_a_timeout(origin, cache, monkeypatch):
    monkeypatch.setenv("RANKLOAD_PROGRESS_SECONDS", "30")
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "0.5")
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(64 * MIB))
    url = origin.add("file.bin", bytes(64 * MIB), hold_at=40 * MIB)
    with pytest.raises(rankload.errors.FetchTimeoutError, match="not a byte came within the deadline"):
        rankload.dist_fetch(url, cache, progress=False)


def load_beside_a_pipe(rank: int, call: str, folder: str) -> str:
    """Anybody who may write to a directory may put a pipe there, which waits for its writer."""
    path, pipe = Path(folder, "model.pth"), Path(folder, "pipe")
    try:
        match call:
            case "sidecar":
                rankload.dist_fetch(path, sidecar=True, timeout=5)
            case "part":
                rankload.open_checkpoint(Path(folder, "model.safetensors.index.json"))
            case "open_checkpoint":
                rankload.open_checkpoint(pipe)
            case _:
                rankload.hub.download_url_to_file(pipe.as_uri(), f"{folder}/copy", progress=False)
    except rankload.CacheError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("call", ["sidecar", "part", "open_checkpoint", "download_url_to_file"])
def test_nobody_waits_for_the_writer_of_a_pipe(tmp_path, checkpoint, call):
    shutil.copy(checkpoint.path, tmp_path / "model.pth")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "pipe"}}))
    os.mkfifo(tmp_path / "model.pth.sha256")
    os.mkfifo(tmp_path / "pipe")
    ranks = 2 if call == "sidecar" else 1
    results = run_ranks(load_beside_a_pipe, ranks, args=(call, str(tmp_path)), timeout_seconds=40)
    assert all("it is no regular file" in result.value for result in results)
