"""The files that tests load are what their names say, by torch's own judgement."""

import hashlib
import zipfile
from collections import OrderedDict

import pytest
import torch

from harness import checkpoints
from harness.checkpoints import assert_same, digest_of

WRITERS = [
    checkpoints.write_zip,
    checkpoints.write_legacy,
    checkpoints.write_legacy_zip,
    checkpoints.write_safetensors,
]


@pytest.mark.parametrize("write", WRITERS)
def test_names_carry_the_hash(tmp_path, write):
    written = write(tmp_path)
    digest = hashlib.sha256(written.path.read_bytes()).hexdigest()
    assert written.sha256 == digest
    assert f"-{digest[:8]}." in written.name


@pytest.mark.parametrize("write", [checkpoints.write_zip, checkpoints.write_legacy])
@pytest.mark.parametrize("make", [checkpoints.state_dict, checkpoints.training_checkpoint])
def test_torch_loads_them_back_whole(tmp_path, write, make):
    written = write(tmp_path, make())
    assert_same(torch.load(written.path, weights_only=True), written.content)


def test_the_formats_are_different_ones(tmp_path):
    heads = [write(tmp_path).path.read_bytes()[:4] for write in WRITERS[:3]]
    assert heads == [b"PK\x03\x04", b"\x80\x02\x8a\x0a", b"PK\x03\x04"]
    with pytest.raises(RuntimeError, match="mmap"):
        torch.load(checkpoints.write_legacy(tmp_path).path, mmap=True, weights_only=True)


@pytest.mark.filterwarnings("ignore:Falling back to the old format:FutureWarning")
def test_torch_hub_unpacks_the_legacy_zip(tmp_path):
    written = checkpoints.write_legacy_zip(tmp_path / "origin")
    assert len(zipfile.ZipFile(written.path).infolist()) == 1
    loaded = torch.hub.load_state_dict_from_url(
        written.path.as_uri(), model_dir=str(tmp_path / "cache"), progress=False, check_hash=True, weights_only=True
    )
    assert_same(loaded, written.content)


def test_safetensors_come_back(tmp_path):
    from safetensors.torch import load_file

    written = checkpoints.write_safetensors(tmp_path)
    loaded = load_file(written.path)
    assert loaded.keys() == written.content.keys()
    assert all(torch.equal(loaded[name], written.content[name]) for name in loaded)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_tags_of_devices_that_are_not_here(tmp_path, is_legacy):
    devices = {"a": "cuda:0", "b": "cuda:1", "c": "cpu"}
    written = checkpoints.write_tagged(tmp_path, devices, is_legacy=is_legacy)
    assert checkpoints.location_tags(written.path) == {"cuda:0", "cuda:1", "cpu"}
    assert_same(torch.load(written.path, map_location="cpu", weights_only=True), written.content)
    # The next file is an ordinary one again.
    assert checkpoints.location_tags(checkpoints.write_zip(tmp_path).path) == {"cpu"}


def test_a_big_one_is_as_big_as_asked(tmp_path):
    written = checkpoints.write_big(tmp_path, 32 * 1024 * 1024)
    assert abs(written.size - 32 * 1024 * 1024) < 100_000
    loaded = torch.load(written.path, mmap=True, weights_only=True)
    assert len(loaded) == 4
    assert len({digest_of(tensor) for tensor in loaded.values()}) == 4
    assert all(torch.isfinite(tensor).all() for tensor in loaded.values())


def test_writing_twice_gives_the_same_content(tmp_path):
    first, second = (digest_of(checkpoints.write_zip(tmp_path, stem=stem).content) for stem in ("one", "two"))
    assert first == second


def change_value(content):
    content["body.bias"][0] += 1


def change_order(content):
    content.move_to_end("head.weight")


def change_type(content):
    content["body.weight"] = content["body.weight"].float()


def cut_tie(content):
    content["embedding.weight"] = content["embedding.weight"].clone()


def change_stride(content):
    content["transposed"] = content["transposed"].contiguous()


def change_container(content):
    content["mask"] = [content["mask"]]


@pytest.mark.parametrize("change", [change_value, change_order, change_type, cut_tie, change_stride, change_container])
def test_the_comparison_sees_every_difference(change):
    expected, changed = checkpoints.state_dict(), checkpoints.state_dict()
    assert_same(changed, expected)
    change(changed)
    with pytest.raises(AssertionError):
        assert_same(changed, expected)
    if change is not cut_tie:
        assert digest_of(changed) != digest_of(expected)


def test_a_dict_is_not_an_ordered_dict():
    with pytest.raises(AssertionError, match="OrderedDict"):
        assert_same({"a": 1}, OrderedDict(a=1))
