"""Files that torch.hub left in the cache, and URLs that share a file name."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shutil

import pytest
import torch
import torch.hub

import rankload
from harness import checkpoints
from harness.checkpoints import digest_of
from harness.fetch_calls import files_in, load, whole_log
from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks, wait_until
from rankload._cache.record import find_record
from rankload._fetch import unvouched


@pytest.fixture
def left_by_torch(origin, checkpoint, cache):
    """The URL of a file that torch.hub itself has fetched into the cache."""
    url = origin.add(checkpoint.name, checkpoint.path)
    torch.hub.load_state_dict_from_url(url, str(cache), progress=False)
    assert files_in(cache) == [checkpoint.name]
    return url


def record_in(cache, name):
    found = find_record(cache / ".rankload" / f"{name}.json")
    return found.record if found else None


@pytest.mark.parametrize("check_hash", [False, True])
def test_file_of_torch_hub_is_adopted(origin, cache, checkpoint, left_by_torch, check_hash):
    results = run_ranks(load, 2, args=(left_by_torch, cache), kwargs={"check_hash": check_hash})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == (1 if check_hash else 2)  # torch's, and one to ask whether it is the origin's
    assert origin.bytes_sent() < checkpoint.size + 100_000
    record = record_in(cache, checkpoint.name)
    assert (record.source, record.sha256) == ("adopted", checkpoint.sha256 if check_hash else None)


def test_adopted_file_is_hashed_when_a_digest_is_first_given(origin, cache, checkpoint, left_by_torch):
    rankload.dist_fetch(left_by_torch, cache)
    assert record_in(cache, checkpoint.name).sha256 is None
    rankload.dist_fetch(left_by_torch, cache, sha256=checkpoint.sha256)
    record = record_in(cache, checkpoint.name)
    assert (record.sha256, record.vouched_by, record.source) == (checkpoint.sha256, "sha256", "adopted")
    assert origin.request_count() == 2


@pytest.fixture
def twins(tmp_path):
    """Two checkpoints of one architecture: the same length to the byte."""
    paths = [tmp_path / "twins" / name for name in "ab"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        torch.save({"w": torch.full((100_000,), float(number))}, path)
    assert paths[0].stat().st_size == paths[1].stat().st_size
    return paths


@pytest.mark.fault(73)
@pytest.mark.parametrize("behaviour", ["honest", "ignores ranges", "gives digests"])
def test_another_urls_file_of_the_same_name_and_length(origin, cache, twins, behaviour, caplog):
    """torch.hub would take it."""

    def add(path):
        digest = base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        headers = {"Repr-Digest": f"sha-256=:{digest}:"} if behaviour == "gives digests" else {}
        ranges = "ignored" if behaviour == "ignores ranges" else "honest"
        return origin.add(f"{path.name}/model.pth", path, headers=headers, ranges=ranges)

    one, other = map(add, twins)
    torch.hub.load_state_dict_from_url(one, str(cache), progress=False)
    for _ in range(2):
        with whole_log(caplog):
            assert rankload.dist_load_state_dict_from_url(other, cache)["w"][0] == 1.0
        assert rankload.dist_load_state_dict_from_url(one, cache)["w"][0] == 0.0
    assert (cache / "model.pth").read_bytes() == twins[0].read_bytes()
    assert f"keeping {other} at" in caplog.text


@pytest.mark.fault(73)
def test_origin_is_asked_once_and_with_little(origin, cache, twins):
    url = origin.add("model.pth", twins[0])
    torch.hub.load_state_dict_from_url(url, str(cache), progress=False)
    before = origin.bytes_sent()
    for _ in range(3):
        assert rankload.dist_fetch(url, cache) == cache / "model.pth"
    assert origin.request_count() == 2 and origin.bytes_sent() - before <= 64 << 10


@pytest.mark.fault(73)
@pytest.mark.parametrize("how", ["offline", "down", "gone"])
def test_origin_that_cannot_be_asked_is_a_warning(origin, cache, twins, how, caplog):
    """And no record: the next call asks again."""
    with contextlib.ExitStack() as running:
        server = running.enter_context(Origin()) if how == "down" else origin
        url = server.add("model.pth", twins[0])
        torch.hub.load_state_dict_from_url(url, str(cache), progress=False)
    if how == "gone":
        origin.add("model.pth", b"", status=404)
    for _ in range(2):
        caplog.clear()
        with whole_log(caplog):
            path = rankload.dist_fetch(url, cache, offline=how == "offline")
        assert path == cache / "model.pth" and "nobody vouches that this is the file at" in caplog.text
    assert record_in(cache, "model.pth") is None


@pytest.mark.fault(20)
def test_truncated_file_of_torch_hub_is_fetched_again(origin, cache, checkpoint, caplog):
    """What torch.hub itself leaves when the connection breaks. It stays: rankload did not put it there."""
    url = origin.add("model.pth", checkpoint.path, truncate_at=checkpoint.size - 50)
    with pytest.raises((OSError, RuntimeError)):
        torch.hub.load_state_dict_from_url(url, str(cache), progress=False)
    assert (cache / "model.pth").stat().st_size == checkpoint.size - 50
    origin.add("model.pth", checkpoint.path)
    with whole_log(caplog):
        path = rankload.dist_fetch(url, cache)
    assert path.read_bytes() == checkpoint.path.read_bytes()
    assert f"keeping {url} at {path}" in caplog.text
    assert (cache / "model.pth").stat().st_size == checkpoint.size - 50
    assert rankload.dist_fetch(url, cache) == path and origin.request_count() == 2


def test_wrong_file_of_torch_hub_is_fetched_again_when_the_digest_is_known(origin, cache, checkpoint, other_checkpoint):
    cache.mkdir()
    (cache / checkpoint.name).write_bytes(other_checkpoint.path.read_bytes())
    url = origin.add(checkpoint.name, checkpoint.path)
    for _ in range(2):
        assert rankload.dist_fetch(url, cache, check_hash=True).read_bytes() == checkpoint.path.read_bytes()
    assert origin.request_count() == 1
    assert (cache / checkpoint.name).read_bytes() == other_checkpoint.path.read_bytes()


def test_torch_hub_finds_what_rankload_fetched(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    rankload.dist_fetch(url, cache)
    found = torch.hub.load_state_dict_from_url(url, str(cache), progress=False, check_hash=True)
    checkpoints.assert_same(found, checkpoint.content)
    assert origin.request_count() == 1


@pytest.mark.fault(21)
def test_two_urls_with_one_file_name(origin, cache, checkpoint, other_checkpoint, caplog):
    """torch.hub gives the second caller the first one's weights."""
    first, second = origin.add("a/model.pth", checkpoint.path), origin.add("b/model.pth", other_checkpoint.path)
    with whole_log(caplog):
        for _ in range(2):
            assert rankload.dist_fetch(first, cache).read_bytes() == checkpoint.path.read_bytes()
            assert rankload.dist_fetch(second, cache).read_bytes() == other_checkpoint.path.read_bytes()
    assert origin.request_count() == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and all(first in warning and second in warning for warning in warnings)


@pytest.mark.fault(21)
def test_two_urls_with_one_file_name_in_all_ranks(origin, cache, checkpoint, other_checkpoint):
    first, second = origin.add("a/model.pth", checkpoint.path), origin.add("b/model.pth", other_checkpoint.path)
    for url, file in ((first, checkpoint), (second, other_checkpoint)):
        results = run_ranks(load, 2, args=(url, cache))
        assert {result.value for result in results} == {digest_of(file.content)}


@pytest.mark.fault(21)
def test_two_urls_with_one_file_name_at_the_same_time(origin, cache, checkpoint, other_checkpoint):
    """The second one waits for the first one's lease, and must not take the file that appears for its own."""
    first = origin.add("a/model.pth", checkpoint.path, hold_at=100)
    second = origin.add("b/model.pth", other_checkpoint.path)
    with start_ranks(load, 1, env="none", args=(first, cache)) as one:
        origin.wait_until_held("a/model.pth")
        with start_ranks(load, 1, env="none", args=(second, cache)) as other:
            wait_until(lambda: "DOWNLOAD" in other.stderr(0), 30, "the other one has found nothing, and waits")
            origin.release("a/model.pth")
            assert one.wait()[0].value == digest_of(checkpoint.content)
            assert other.wait()[0].value == digest_of(other_checkpoint.content)


def test_same_content_under_two_urls_is_one_file_when_the_digest_is_given(origin, cache, checkpoint):
    first, second = origin.add("a/model.pth", checkpoint.path), origin.add("b/model.pth", checkpoint.path)
    rankload.dist_fetch(first, cache)
    rankload.dist_fetch(second, cache, sha256=checkpoint.sha256)
    assert origin.request_count() == 1


def test_file_that_is_removed_while_its_origin_is_asked_is_an_error_of_ours(origin, cache, checkpoint, monkeypatch):
    url = origin.add("file.pth", checkpoint.path)
    cache.mkdir()
    shutil.copy(checkpoint.path, cache / "file.pth")
    read = unvouched.read_bounded

    def read_and_remove(*arguments, **options):
        answer = read(*arguments, **options)
        (cache / "file.pth").unlink()
        return answer

    monkeypatch.setattr(unvouched, "read_bounded", read_and_remove)
    with pytest.raises(rankload.CacheError, match=r"cannot read .*file\.pth"):
        rankload.dist_fetch(url, cache)
