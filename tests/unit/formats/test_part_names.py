"""Which names the parts of a sharded checkpoint may have: on this machine, and in a cache."""

import json

import pytest
import torch

import rankload
from rankload._formats.sharded import is_plain_name


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "_hidden_state.pth",
        "epoch=3+step=10.ckpt",
        "7",
        "a" * 200,
    ],
)
def test_names_that_a_cache_takes(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-rf",
        "x/part",
        "x\\part",
        "../part",
        "/part",
        "part\n",
        "part ",
        "part\0",
        "pa rt",
        "pärt",
        "p\u202etrap",
        "part\x1b[2J",
        "a" * 201,
        "weights.pth.partial",
        "weights.pth.journal",
        "weights.pth.lease",
        "weights.pth.tmp",
        "weights.pth.LEASE",
        "https://host/part",
        "part.",
        "part?query",
        "part%2e",
    ],
)
def test_names_that_a_cache_does_not_take(name):
    assert not is_plain_name(name)


REFUSED = {
    "empty": "",
    "absolute": "/etc/part",
    "parent": "../part",
    "inner parent": "x/../part",
    "here": "./part",
    "inner here": "x/./part",
    "double slash": "x//part",
    "folder": "x/",
    "backslash": "x\\part",
    "NUL": "part\0",
    "newline": "part\nINFO all is well",
    "escape": "part\x1b[2J",
    "C1 control": "part\x9b2J",
    "override": "part\u202eshtp.",
    "isolate": "\u2066part",
    "zero width": "pa\u200brt",
    "line separator": "part\u2028",
    "lone surrogate": "part\udc80",
    "URL": "http://host/part",
    "long": "a" * 256,
    "long in bytes": "ä" * 128,
    "long folder": "a" * 256 + "/part",
    "trailing blank": "part ",
    "trailing blank of a folder": "x /part",
    "leading blank": " part",
}


@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED)
def test_parts_that_an_index_may_not_name(tmp_path, name):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": name}}))
    for call in (rankload.load, rankload.open_checkpoint):
        with pytest.raises(rankload.LoadError, match="not beside it") as caught:
            call(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["gewichte-größe.pth", "重み.pth", "x/part.pth", "a b.pth", ".hidden.pth", "-.pth"])
def test_parts_that_a_local_index_may_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save({"weight": torch.ones(2)}, tmp_path / name)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": name}}))
    assert rankload.load(path)["weight"].tolist() == [1, 1]
    with rankload.open_checkpoint(path) as checkpoint:
        assert checkpoint["weight"].tolist() == [1, 1]
