"""hf:// URLs, resolved by the real client against a Hub made of an origin."""

from __future__ import annotations

import json

import pytest

import rankload
from harness import hf
from harness.fetch_calls import left_in
from harness.origin import Origin
from harness.ranks import run_ranks

TOKEN = "hf_SECRET"


@pytest.fixture
def cdn():
    with Origin() as server:
        yield server


@pytest.fixture
def repository(origin, cdn, monkeypatch, big_content):
    published = hf.publish(origin, "org/tiny", {"weights.bin": big_content, "config.json": b"{}"}, token=TOKEN, cdn=cdn)
    for name, value in published.environment.items():
        monkeypatch.setenv(name, value)
    return published


def fetch_bytes(rank, url, cache, **arguments):
    """In a process of its own: the client reads its variables when it is imported."""
    return rankload.dist_fetch(url, cache, **arguments).read_bytes()


def test_weights_come_from_where_the_hub_redirects_and_its_digest_vouches(
    origin, cdn, cache, repository, big_content, monkeypatch
):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(1 << 20))
    url = repository.fsspec_url("weights.bin")
    results = run_ranks(fetch_bytes, 2, args=(url, str(cache)))
    assert {result.value == big_content for result in results} == {True}
    assert origin.request_count(repository.resolved("weights.bin")) == 1  # all other ranges went to the CDN at once
    assert cdn.bytes_sent() == len(big_content) and cdn.request_count() > 1
    assert all("authorization" not in request.headers for request in cdn.requests())
    assert json.loads((cache / ".rankload/weights.bin.json").read_text())["vouched_by"] == "x-linked-etag"
    assert "SECRET" not in "".join(result.stderr for result in results)
    assert left_in(cache) == []


def test_small_file_that_comes_directly(cache, repository):
    [result] = run_ranks(fetch_bytes, 1, env="none", args=(repository.fsspec_url("config.json"), str(cache)))
    assert result.value == b"{}"


def test_wrong_bytes_are_found_out(cdn, cache, repository, big_content):
    cdn.add(repository.blob("weights.bin"), big_content, flip_byte_at=5)
    [result] = run_ranks(fetch_error, 1, env="none", args=(repository.fsspec_url("weights.bin"), str(cache)))
    assert result.value == "x-linked-etag"


def test_the_hubs_own_page_url(cache, repository, big_content):
    [result] = run_ranks(fetch_bytes, 1, env="none", args=(repository.url("weights.bin"), str(cache)))
    assert result.value == big_content


def fetch_error(rank, url, cache):
    with pytest.raises(rankload.errors.DigestMismatchError) as caught:
        rankload.dist_fetch(url, cache)
    return caught.value.source


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://[mirror",
        "http://mirror:port",
        "mirror.example",
        "http://user:SECRET/x@mirror",
        "http://user:x@SECRET@mirror",
    ],
)
def test_endpoint_that_is_no_url(origin, cache, monkeypatch, endpoint):
    """It is named where it counts, and disturbs nobody else."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for call in (
        lambda: rankload.dist_fetch("hf://org/tiny/weights.bin", cache),
        lambda: rankload.dist_fetch("hf://org/tiny", cache),
        lambda: rankload.open_checkpoint("hf://org/tiny"),
        lambda: rankload.dist_snapshot("org/tiny", cache_dir=cache),
    ):
        with pytest.raises(rankload.ArgumentError, match="HF_ENDPOINT") as caught:
            call()
        assert "SECRET" not in str(caught.value)
    assert rankload.dist_fetch(origin.add("file.bin", b"content"), cache).read_bytes() == b"content"
