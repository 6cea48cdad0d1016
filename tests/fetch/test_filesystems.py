"""Files on s3 (a real client against moto's server), and on whatever else fsspec reaches."""

from __future__ import annotations

import json
import os

import fsspec
import pytest

import rankload
from harness.chaos import Fault, chaos
from harness.checkpoints import digest_of
from harness.fetch_calls import error_in, errors_of, expect, files_in, left_in, load
from harness.ranks import run_ranks
from harness.s3 import s3
from harness.scripts import run_script


@pytest.fixture(scope="module")
def storage():
    with s3() as server:
        yield server


@pytest.fixture
def in_s3(storage, monkeypatch):
    """The server, with the environment that finds it."""
    for name, value in storage.environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return storage


@pytest.fixture
def memory():
    """fsspec's filesystem in this process' memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def gets(storage, path):
    return [access for access in storage.accesses() if (access.method, access.path) == ("GET", path)]


def test_object_into_all_ranks_with_one_download(in_s3, cache, checkpoint):
    url = in_s3.put(f"models/{checkpoint.name}", checkpoint.path.read_bytes())
    results = run_ranks(load, 3, args=(url, cache), kwargs={"check_hash": True})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert len(gets(in_s3, f"/models/{checkpoint.name}")) == 1
    record = json.loads((cache / f".rankload/{checkpoint.name}.json").read_text())
    assert (record["url"], record["vouched_by"]) == (url, "hash_prefix")


def test_object_in_parallel_ranges(in_s3, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(1 << 20))
    url = in_s3.put("models/ranges.bin", big_content)
    [result] = run_ranks(fetch_bytes, 1, env="none", args=(url, str(cache)))
    assert result.value == big_content
    assert {access.status for access in gets(in_s3, "/models/ranges.bin")} == {206}
    assert left_in(cache) == []


def test_object_that_is_not_there(in_s3, cache):
    in_s3.put("models/other.bin", b"content")
    errors = errors_of(load, "s3://models/missing.pth", cache)
    expect(errors, rankload.FetchError, "s3://models/missing.pth", "no such file there")
    assert files_in(cache) == []


def test_object_without_credentials(in_s3, cache, monkeypatch, tmp_path):
    """Said at once: no second try finds any."""
    url = in_s3.put("models/private.bin", b"content")
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    [result] = run_ranks(fetch_bytes, 1, env="none", args=(url, str(cache)))
    error = error_in(result)
    assert type(error) is rankload.FetchError and "no credentials" in str(error) and url in str(error)
    assert "retrying" not in result.stderr


def test_connection_that_breaks_is_tried_again(in_s3, cache, big_content, monkeypatch):
    url = in_s3.put("models/broken.bin", big_content)
    with chaos(in_s3.port, Fault(), Fault(cut_at=2 << 20), Fault()) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.through(in_s3.endpoint_url))
        [result] = run_ranks(fetch_bytes, 1, env="none", args=(url, str(cache)))
    assert result.value == big_content


def test_warm_call_asks_nobody(in_s3, cache, big_content):
    url = in_s3.put("models/warm.bin", big_content)
    run_ranks(fetch_bytes, 1, env="none", args=(url, str(cache)))
    before = len(in_s3.accesses())
    [result] = run_ranks(fetch_bytes, 1, env="none", args=(url, str(cache)))
    assert result.value == big_content and len(in_s3.accesses()) == before


def test_memory(memory, cache):
    memory.pipe("/models/file.bin", b"content" * 1000)
    assert rankload.dist_fetch("memory://models/file.bin", cache).read_bytes() == b"content" * 1000


def test_mirror_on_another_filesystem(memory, origin, cache, checkpoint):
    memory.pipe("/models/model.pth", checkpoint.path.read_bytes())
    url = origin.add("model.pth", b"", status=404)
    path = rankload.dist_fetch([url, "memory://models/model.pth"], cache, sha256=checkpoint.sha256)
    assert path.read_bytes() == checkpoint.path.read_bytes()


def test_sidecar_on_another_filesystem(memory, cache, checkpoint):
    memory.pipe("/models/model.pth", checkpoint.path.read_bytes())
    memory.pipe("/models/model.pth.sha256", f"{checkpoint.sha256}  model.pth\n".encode())
    path = rankload.dist_fetch("memory://models/model.pth", cache, sidecar=True)
    assert json.loads((cache / ".rankload/model.pth.json").read_text())["vouched_by"] == "sidecar"
    assert path.read_bytes() == checkpoint.path.read_bytes()


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_object_that_is_replaced_while_it_is_read(memory, cache, monkeypatch, pieces):
    """After the look at its version, before the last range: reads name no version."""
    size_bytes = 20 << 20
    memory.pipe("/models/file.bin", b"A" * size_bytes)
    read, reads = type(memory).cat_file, []

    def replace_then_read(self, path, **arguments):
        reads.append(path)
        if len(reads) == pieces:
            self.pipe_file(path, b"B" * size_bytes)
        return read(self, path, **arguments)

    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(size_bytes))
    monkeypatch.setattr(type(memory), "cat_file", replace_then_read)
    assert rankload.dist_fetch("memory://models/file.bin", cache).read_bytes() == b"B" * size_bytes


def test_directory_is_no_file(memory, cache):
    memory.pipe("/models/folder/file.bin", b"content")
    with pytest.raises(rankload.FetchError, match="no such file"):
        rankload.dist_fetch("memory://models/folder", cache)


def test_filesystem_that_is_not_installed(cache):
    """Its package is named, and the extra that brings it."""
    code = f"""
import sys
sys.modules["gcsfs"] = None
import rankload
try:
    rankload.dist_fetch("gs://bucket/model.pth", {str(cache)!r})
except rankload.FetchError as error:
    print(error)
"""
    assert "rankload[gcs]" in run_script(code).check().stdout


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables_of_hugging_face(cache, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(rankload.errors.OfflineError, match=r"rankload prefetch hf://org/repo/model\.safetensors"):
        rankload.dist_fetch("hf://org/repo/model.safetensors", cache)


def fetch_bytes(rank, url, cache):
    return rankload.dist_fetch(url, cache).read_bytes()


@pytest.mark.parametrize("kind", [PermissionError, ValueError, RuntimeError])
def test_error_of_a_filesystem_shows_no_secret(memory, cache, monkeypatch, kind):
    def refuse(self, path, **arguments):
        raise kind("refused: https://user:SECRET@host/model.bin?sig=SECRET")

    monkeypatch.setattr(type(memory), "info", refuse)
    with pytest.raises(rankload.FetchError, match=r"refused: https://host/model\.bin") as caught:
        rankload.dist_fetch("memory://models/model.bin", cache)
    assert "SECRET" not in str(caught.value)
