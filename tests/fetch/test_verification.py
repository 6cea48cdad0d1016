"""Digests, and files that are not what they should be: never published, on no rank loaded."""

from __future__ import annotations

import pickle

import pytest

import rankload
from harness import checkpoints
from harness.checkpoints import digest_of
from harness.fetch_calls import errors_of, expect, fetch, files_in, load
from harness.ranks import run_ranks
from harness.replies import Reply

WRONG = "0" * 64


class Harmless:
    """An object that weights_only does not know."""

    def __eq__(self, other):
        return isinstance(other, Harmless)

    __hash__ = None


def load_object(rank, url, model_dir):
    return repr(rankload.dist_load_state_dict_from_url(url, model_dir, weights_only=False)["extra"])


def quarantined(name):
    """What a cache holds after a download with a wrong digest."""
    return [f".rankload/quarantine/{name}", f".rankload/quarantine/{name}.json"]


@pytest.mark.fault(18)
def test_wrong_sha256_by_argument(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path)
    errors = errors_of(load, url, cache, ranks=3, sha256=WRONG)
    text = f'invalid hash value (expected "{WRONG}", got "{checkpoint.sha256}")'
    expect(
        errors,
        rankload.errors.DigestMismatchError,
        text,
        url,
        "or the expected digest (sha256) is that of another file",
        "kept at",
    )
    assert isinstance(errors[0], RuntimeError)
    assert (errors[0].expected, errors[0].got) == (WRONG, checkpoint.sha256)
    assert files_in(cache) == quarantined("model.pth")
    assert (cache / ".rankload/quarantine/model.pth").read_bytes() == checkpoint.path.read_bytes()
    assert origin.request_count() == 2


def test_wrong_hash_prefix_in_the_file_name(origin, cache, checkpoint):
    url = origin.add("model-0badc0de.pth", checkpoint.path)
    errors = errors_of(load, url, cache, check_hash=True)
    text = f'invalid hash value (expected "0badc0de", got "{checkpoint.sha256}")'
    expect(errors, rankload.errors.DigestMismatchError, text, url)
    assert files_in(cache) == quarantined("model-0badc0de.pth")


def test_flipped_byte_on_the_way(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path, flip_byte_at=checkpoint.size // 2)
    expect(errors_of(load, url, cache, check_hash=True), rankload.errors.DigestMismatchError, "invalid hash value")
    assert files_in(cache) == quarantined(checkpoint.name)


@pytest.mark.fault(18)
def test_bytes_that_were_flipped_once_are_fetched_once_more(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path, Reply(flip_byte_at=checkpoint.size // 2), Reply())
    results = run_ranks(load, 2, args=(url, cache), kwargs={"check_hash": True})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert [request.headers.get("range") for request in origin.requests()] == [None, None]


def test_right_digests(origin, cache, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path)
    arguments = {"check_hash": True, "sha256": "sha256:" + checkpoint.sha256.upper()}
    results = run_ranks(load, 2, args=(url, cache), kwargs=arguments)
    assert {result.value for result in results} == {digest_of(checkpoint.content)}


@pytest.mark.parametrize("name", ["resnet.pth", "resnet-.pth", "resnet-50A.pth"])
def test_check_hash_without_a_digest_in_the_name(origin, cache, name):
    url = origin.add(name, b"")
    expect(errors_of(load, url, cache, check_hash=True), rankload.ArgumentError, "check_hash=True", name, "sha256=")
    assert origin.request_count() == 0


@pytest.mark.fault(56)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "ckpt-20230101.pth", "resnet-50.pth"])
def test_name_that_only_looks_like_a_digest(origin, cache, checkpoint, name):
    url = origin.add(name, checkpoint.path)
    [result] = run_ranks(load, 1, env="none", args=(url, cache))
    assert result.value == digest_of(checkpoint.content)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"sha256": "abc"}, ["sha256='abc'", "64 hex digits", "check_hash"]),
        ({"sha256": "g" * 64}, ["sha256=", "64 hex digits"]),
        ({"scope": "planet"}, ["scope='planet'", "'auto'", "'job'", "'node'", "'process'"]),
        ({"verify": "sometimes"}, ["verify='sometimes'", "'once'", "'always'", "'never'"]),
        ({"timeout": 0}, ["timeout=0", "positive"]),
        ({"timeout": -1.5}, ["timeout=-1.5", "positive"]),
        ({"timeout": float("nan")}, ["timeout=nan", "positive"]),
        ({"file_name": "../model.pth"}, ["file_name='../model.pth'", "without '..'"]),
        ({"file_name": "/etc/model.pth"}, ["file_name='/etc/model.pth'", "relative"]),
        ({"file_name": "a/../../model.pth"}, ["file_name=", "without '..'"]),
        ({"file_name": ".rankload/model.pth"}, ["file_name="]),
    ],
)
def test_argument_that_cannot_be(origin, cache, arguments, texts):
    url = origin.add("model.pth", b"")
    with pytest.raises(rankload.ArgumentError) as caught:
        rankload.dist_fetch(url, cache, **arguments)
    assert isinstance(caught.value, ValueError)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert origin.request_count() == 0
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ftp://host.invalid/model.pth", "ftp"),
        ("http://host.invalid/", "file_name="),
        ("http://host.invalid", "file_name="),
        ("http://host.invalid/folder/", "file_name="),
        ("file://other-host/model.pth", "file:///"),
        ("", "url="),
        ([], "url="),
        (["http://host.invalid/a.pth", "/local/a.pth"], "mirrors"),
    ],
)
def test_url_that_cannot_be(cache, url, text):
    with pytest.raises(rankload.ArgumentError, match=text):
        rankload.dist_fetch(url, cache)


NOT_CHECKPOINTS = {
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(500), "begins with the bytes 89 50 4e 47"),
    "json": (b'{"error": "no such model"}', "no such model"),
    "random": (bytes(range(200, 256)) * 40, "begins with the bytes c8 c9"),
    "empty": (b"", "an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "Git LFS pointer"),
    "pickle": (pickle.dumps({"a": 1}), "a plain pickle"),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_not_a_checkpoint(origin, cache, kind):
    content, text = NOT_CHECKPOINTS[kind]
    url = origin.add("model.pth", content)
    expect(errors_of(load, url, cache), rankload.errors.NotACheckpointError, url, "expected a checkpoint", text)
    assert files_in(cache) == []


def test_empty_body_is_no_file_either(origin, cache):
    url = origin.add("file.bin", b"")
    expect(errors_of(fetch, url, cache), rankload.errors.NotACheckpointError, url, "an empty file")
    assert files_in(cache) == []


def test_unpicklable_class_under_weights_only(origin, cache, tmp_path):
    file = checkpoints.write_zip(tmp_path, {"extra": Harmless()})
    url = origin.add("model.pth", file.path)
    errors = errors_of(load, url, cache)
    expect(errors, rankload.errors.UnsafePickleError, "Harmless", "weights_only=False")
    assert isinstance(errors[0], pickle.UnpicklingError) and isinstance(errors[0], RuntimeError)


def test_unpicklable_class_with_weights_only_false(origin, cache, tmp_path):
    file = checkpoints.write_zip(tmp_path, {"extra": Harmless()})
    results = run_ranks(load_object, 2, args=(origin.add("model.pth", file.path), cache))
    assert all("Harmless" in result.value for result in results)
