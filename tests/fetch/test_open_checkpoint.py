"""A remote checkpoint is listed, and one tensor of it read, by a few ranges."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import rankload
from harness.fetch_calls import whole_log
from harness.nginx import nginx
from harness.replies import Reply
from rankload._formats import zip_archive as torch_zip
from rankload._formats.source import LocalSource

CONTENT = {f"layer.{number}.weight": torch.full((300, 100), float(number)) for number in range(50)}


@pytest.fixture(scope="module", params=["zip", "legacy", "safetensors"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("remote") / "file"
    if request.param == "safetensors":
        save_file(CONTENT, path)
    else:
        torch.save(CONTENT, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


def test_lists_and_reads_one_tensor(origin, path):
    with rankload.open_checkpoint(origin.add("model.pth", path)) as checkpoint:
        assert {*checkpoint} == {*CONTENT}
        listed, requests = origin.bytes_sent(), origin.request_count()
        assert listed < 300_000 and requests <= 6
        assert torch.equal(checkpoint["layer.49.weight"], CONTENT["layer.49.weight"])
        # None where it lies in a block that was read for the list: torch.save orders a legacy file by address.
        assert origin.bytes_sent() - listed <= 120_000 and origin.request_count() <= requests + 1
    assert checkpoint.size_bytes == 50 * 120_000 < path.stat().st_size


def test_asking_for_a_name_reads_nothing(origin, path):
    with rankload.open_checkpoint(origin.add("model.pth", path)) as checkpoint:
        requests = origin.request_count()
        assert "layer.20.weight" in checkpoint and "other" not in checkpoint and checkpoint.get("other") is None
        assert origin.request_count() == requests


def test_reading_everything_keeps_little_of_it(origin, path):
    with rankload.open_checkpoint(origin.add("model.pth", path)) as checkpoint:
        assert all(torch.equal(tensor, CONTENT[name]) for name, tensor in checkpoint.items())
        kept = checkpoint._sources("model.pth")._kept
        assert sum(map(len, kept.values())) <= 4 << 20


def sparse(path, tensor_bytes, count):
    """A checkpoint of many gigabytes that takes no room on disk."""
    with torch.serialization.skip_data():
        torch.save({f"layer.{n}.weight": torch.empty(tensor_bytes, dtype=torch.uint8) for n in range(count)}, path)


def test_ten_gigabytes_are_listed_with_less_than_a_megabyte(tmp_path):
    sparse(tmp_path / "model.pth", 10_000_000, 1000)
    assert (tmp_path / "model.pth").stat().st_size > 10_000_000_000
    with nginx(tmp_path) as server, rankload.open_checkpoint(server.url("model.pth")) as checkpoint:
        assert len(checkpoint) == 1000
        assert checkpoint.size_bytes == 10_000_000_000
        assert sum(access.bytes for access in server.accesses()) < 1_000_000
        assert len(server.accesses()) <= 8


@pytest.mark.parametrize("protocol", [2, 4])
def test_offsets_that_are_inferred_are_those_in_the_headers(tmp_path, protocol):
    path = tmp_path / "file"
    torch.save({str(n): torch.ones(n + 1) for n in range(200)}, path, pickle_protocol=protocol)
    with path.open("rb") as file:
        source = LocalSource(file.fileno())
        directory = torch_zip.read_directory(source)
        likely = torch_zip.likely_offsets(directory)
        assert likely == torch_zip.payload_offsets(source, directory)


def test_several_files_are_opened_where_they_are(origin, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one")
    save_file({"b": torch.zeros(3)}, tmp_path / "two")
    origin.add("repo/one", tmp_path / "one")
    origin.add("repo/two", tmp_path / "two")
    index = json.dumps({"weight_map": {"a": "one", "b": "two"}}).encode()
    url = origin.add("repo/model.safetensors.index.json", index)
    with rankload.open_checkpoint(url) as checkpoint:
        assert {name: tensor.tolist() for name, tensor in checkpoint.items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_headers_are_sent_and_queries_never_shown(origin, path, caplog):
    url = origin.add("model.pth", path, required_headers={"Authorization": "Bearer SECRET"})
    with (
        whole_log(caplog),
        rankload.open_checkpoint(url + "?sig=SECRET", headers={"Authorization": "Bearer SECRET"}) as one,
    ):
        assert "SECRET" not in repr(one)
    with whole_log(caplog), pytest.raises(rankload.errors.HTTPStatusError) as caught:
        rankload.open_checkpoint(url + "?sig=SECRET")
    assert "SECRET" not in caplog.text + str(caught.value)


def test_busy_origin_is_asked_again(origin, path, monkeypatch):
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.01")
    url = origin.add("model.pth", path, Reply(status=503), Reply(truncate_at=100), Reply(), Reply(status=503), Reply())
    with rankload.open_checkpoint(url) as checkpoint:
        assert {*checkpoint} == {*CONTENT}


def test_file_that_is_replaced_meanwhile(origin, path):
    with rankload.open_checkpoint(origin.add("model.pth", path)) as checkpoint:
        origin.add("model.pth", b"another" * 100_000)
        with pytest.raises(rankload.errors.ContentChangedError):
            checkpoint["layer.20.weight"]


def test_origin_without_ranges(origin, path):
    url = origin.add("model.pth", path, ranges="ignored")
    with pytest.raises(rankload.FetchError, match="fetch it with dist_fetch") as caught:
        rankload.open_checkpoint(url)["layer.20.weight"]
    assert url.rpartition("?")[0] in str(caught.value)


def test_offline(origin, path, monkeypatch):
    monkeypatch.setenv("RANKLOAD_OFFLINE", "1")
    with pytest.raises(rankload.errors.OfflineError):
        rankload.open_checkpoint(origin.add("model.pth", path))
    assert origin.request_count() == 0
    assert {*rankload.open_checkpoint(path)} == {*CONTENT}


@pytest.mark.parametrize("content", [b"", b"<html>Please sign in</html>", b"PK\x03\x04" + bytes(range(256)) * 4])
def test_what_is_no_checkpoint(origin, content):
    with pytest.raises(rankload.LoadError):
        rankload.open_checkpoint(origin.add("model.pth", content))


def test_what_cannot_be_asked_for():
    for url in ("gopher://host/file", "", "http://"):
        with pytest.raises(rankload.RankloadError):
            rankload.open_checkpoint(url)
