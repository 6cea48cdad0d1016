"""A file that is replaced at its URL: noticed when the caller asks, by one conditional request."""

from __future__ import annotations

import io
import json
import os
from email.utils import formatdate
from pathlib import Path

import pytest
import torch
import torch.hub

import rankload
from harness.fetch_calls import fetch, files_in
from harness.nginx import nginx
from harness.ranks import run_ranks

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "last.pth").write_bytes(OLD)
    return folder


@pytest.mark.fault(74)
def test_unchanged_file_costs_one_request_without_a_body(root, cache):
    with nginx(root) as server:
        url = server.url("last.pth")
        path = rankload.dist_fetch(url, cache)
        for _ in range(2):
            assert rankload.dist_fetch(url, cache, refresh=True) == path
        accesses = server.wait_for_accesses(3)
    assert [access.status for access in accesses[1:]] == [304, 304]
    assert path.read_bytes() == OLD


@pytest.mark.fault(74)
def test_changed_file_is_fetched_and_replaces_the_old_one(root, cache):
    with nginx(root) as server:
        url = server.url("last.pth")
        path = rankload.dist_fetch(url, cache)
        with path.open("rb") as reader:  # whoever has it open, or mapped, keeps it
            replace(root / "last.pth", NEW)
            assert rankload.dist_fetch(url, cache).read_bytes() == OLD  # as in torch.hub
            assert rankload.dist_fetch(url, cache, refresh=True) == path
            assert reader.read() == OLD
        assert path.read_bytes() == NEW
        assert rankload.dist_fetch(url, cache).read_bytes() == NEW
    assert files_in(cache) == [".rankload/last.pth.json", "last.pth"]


def replace(path, content):
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, (1, 1))
    other.replace(path)


@pytest.mark.parametrize("validators", ["etag", "date", "none"])
@pytest.mark.parametrize("is_changed", [False, True])
def test_origin_that_knows_no_conditions(origin, cache, validators, is_changed):
    """What its answer says is compared; of the body one byte is asked for."""

    def add(content, day):
        headers = {
            "etag": {},
            "date": {"ETag": None, "Last-Modified": formatdate(day, usegmt=True)},
            "none": {"ETag": None},
        }
        return origin.add("last.pth", content, headers=headers[validators])

    url = add(OLD, 1)
    rankload.dist_fetch(url, cache)
    before = origin.bytes_sent()
    if is_changed:
        add(NEW, 10**6)
    found = rankload.dist_fetch(url, cache, refresh=True)
    assert found.read_bytes() == (NEW if is_changed else OLD)
    assert origin.bytes_sent() - before <= (len(NEW) + 1 if is_changed else 1)


def test_one_rank_asks_for_all(root, cache):
    with nginx(root) as server:
        url = server.url("last.pth")
        run_ranks(fetch, 3, args=(url, cache))
        replace(root / "last.pth", NEW)
        results = run_ranks(fetch, 3, args=(url, cache), kwargs={"refresh": True})
        assert {Path(result.value).read_bytes() for result in results} == {NEW}
        assert len(server.accesses()) == 3  # the old one, the question, the new one


def test_ranks_that_disagree_are_told(root, cache):
    with nginx(root) as server:
        results = run_ranks(fetch_by_rank, 2, args=(server.url("last.pth"), cache))
    assert all("ArgumentMismatchError" in result.value and "refresh" in result.value for result in results)


def fetch_by_rank(rank, url, cache):
    try:
        return fetch(rank, url, cache, refresh=rank == 0)
    except rankload.RankloadError as error:
        return f"{type(error).__name__} {error}"


def test_digest_says_which_file_is_wanted(origin, cache, checkpoint):
    url = origin.add("last.pth", checkpoint.path)
    rankload.dist_fetch(url, cache, sha256=checkpoint.sha256)
    rankload.dist_fetch(url, cache, sha256=checkpoint.sha256, refresh=True)
    assert origin.request_count() == 1


def test_origin_that_cannot_be_asked_is_an_error(origin, cache, monkeypatch):
    """Whoever asks for the present file must not get an old one."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    url = origin.add("last.pth", OLD)
    rankload.dist_fetch(url, cache)
    origin.add("last.pth", b"", status=503)
    with pytest.raises(rankload.errors.HTTPStatusError, match="503"):
        rankload.dist_fetch(url, cache, refresh=True)
    with pytest.raises(rankload.ArgumentError, match="offline"):
        rankload.dist_fetch(url, cache, refresh=True, offline=True)
    assert rankload.dist_fetch(url, cache).read_bytes() == OLD


def test_file_of_torch_hub_is_left_alone_and_the_new_one_kept_beside_it(origin, cache, checkpoint, other_checkpoint):
    url = origin.add("last.pth", checkpoint.path)
    torch.hub.load_state_dict_from_url(url, str(cache), progress=False)
    assert rankload.dist_fetch(url, cache, refresh=True) == cache / "last.pth"
    origin.add("last.pth", other_checkpoint.path)
    for refresh in (True, False, True):
        path = rankload.dist_fetch(url, cache, refresh=refresh)
        assert path.read_bytes() == other_checkpoint.path.read_bytes() and path != cache / "last.pth"
    assert (cache / "last.pth").read_bytes() == checkpoint.path.read_bytes()


def test_parts_of_an_index_are_asked_for_too(origin, cache):
    import json

    from safetensors.torch import save

    index = json.dumps({"weight_map": {"w": "part.safetensors"}}).encode()
    url = origin.add("model.safetensors.index.json", index)
    for value in (1.0, 2.0):
        origin.add("part.safetensors", save({"w": torch.full((3,), value)}))
        assert rankload.dist_load_state_dict_from_url(url, cache, refresh=True)["w"][0] == value


def test_setting_and_command_line(root, cache, monkeypatch):
    from rankload._cli import main

    with nginx(root) as server:
        url = server.url("last.pth")
        rankload.dist_fetch(url, cache)
        replace(root / "last.pth", NEW)
        monkeypatch.setenv("RANKLOAD_REFRESH", "1")
        assert rankload.dist_fetch(url, cache).read_bytes() == NEW
        monkeypatch.delenv("RANKLOAD_REFRESH")
        replace(root / "last.pth", OLD)
        monkeypatch.setattr(
            "sys.argv", ["rankload", "prefetch", url, "--model-dir", str(cache), "--refresh", "--any-file"]
        )
        with pytest.raises(SystemExit):
            main()
    assert (cache / "last.pth").read_bytes() == OLD


# --- a checkpoint in several files


def add_parts(origin, value, names=("a", "b")):
    for name in names:
        file = io.BytesIO()
        torch.save({name: torch.full((4,), value)}, file)
        origin.add(f"model/{name}.bin", file.getvalue())


@pytest.fixture
def half_renewed(origin, cache, monkeypatch):
    """The URL of an index of two parts, of which the first alone could be renewed."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    index = {"weight_map": {"a": "a.bin", "b": "b.bin"}}
    url = origin.add("model/model.bin.index.json", json.dumps(index).encode())
    add_parts(origin, 1.0)
    assert values_of(url, cache) == {1.0}
    add_parts(origin, 2.0)
    origin.add("model/b.bin", b"", status=503)
    with pytest.raises(rankload.FetchError):
        values_of(url, cache, refresh=True)
    return url


def values_of(url, cache, **arguments):
    loaded = rankload.dist_load_state_dict_from_url(url, cache, progress=False, **arguments)
    return {value for tensor in loaded.values() for value in tensor.tolist()}


@pytest.mark.fault(74)
def test_parts_of_two_versions_are_not_loaded_together(origin, cache, half_renewed):
    with pytest.raises(rankload.FetchError):  # also if nobody asks for the present files
        values_of(half_renewed, cache)
    add_parts(origin, 2.0)
    assert values_of(half_renewed, cache) == {2.0}
    before = origin.request_count()
    assert values_of(half_renewed, cache) == {2.0}
    assert origin.request_count() == before


@pytest.mark.fault(74)
def test_parts_of_two_versions_are_no_use_offline(origin, cache, half_renewed, monkeypatch):
    monkeypatch.setenv("RANKLOAD_OFFLINE", "1")
    with pytest.raises(rankload.errors.OfflineError, match="only some files of this checkpoint have been renewed"):
        values_of(half_renewed, cache)


def test_renewal_that_has_replaced_nothing_changes_nothing(origin, cache, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    url = origin.add("model/model.bin.index.json", b'{"weight_map": {"a": "a.bin"}}')
    add_parts(origin, 1.0, "a")
    values_of(url, cache)
    origin.add("model/a.bin", b"", status=503)
    with pytest.raises(rankload.FetchError):
        values_of(url, cache, refresh=True)
    monkeypatch.setenv("RANKLOAD_OFFLINE", "1")
    assert values_of(url, cache) == {1.0}
