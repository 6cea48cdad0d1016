"""The index says of every tensor what torch.load makes of it, and reads it alone."""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import formats
import pytest
import torch
from safetensors.torch import save_file

import rankload
from harness import checkpoints
from rankload._formats.entry import ITEM_BYTES
from rankload._formats.pickle_values import Unbuilt

DTYPES = [getattr(torch, name) for name in ITEM_BYTES if hasattr(torch, name) and not name.startswith(("q", "float4"))]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert type(found) is type(expected) and found.requires_grad == expected.requires_grad
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert found.device.type == "cpu"
    assert bits_of(found) == bits_of(expected)


def bits_of(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


def assert_reads_as(path, expected) -> None:
    """All tensors of a flat dict, one by one."""
    with rankload.open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
        for name, tensor in checkpoint.items():
            assert_same(tensor, expected[name])


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_equal_what_torch_loads(tmp_path, is_zip, protocol):
    path = tmp_path / "file"
    torch.save(checkpoints.state_dict(), path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    assert_reads_as(path, torch.load(path, weights_only=False))


def test_archive_of_one_checkpoint(tmp_path):
    file = checkpoints.write_legacy_zip(tmp_path)
    assert_reads_as(file.path, file.content)
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(rankload.LoadError, match="cannot be unpacked"):
        rankload.open_checkpoint(file.path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    path = tmp_path / "file"
    torch.save({"x": torch.arange(12).view(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype)}, path)
    assert_reads_as(path, torch.load(path, weights_only=False))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_views_ties_and_parameters(tmp_path, is_zip):
    path = tmp_path / "file"
    base = torch.randn(10, 10)
    content = collections.OrderedDict(
        base=base, tied=base, rows=base[3:5], transposed=base.t(), column=base[:, 7], diagonal=base.diagonal(1),
        expanded=torch.ones(1).expand(5, 5), empty=torch.empty(0, 3), frozen=torch.nn.Parameter(base[0], False),
        parameter=torch.nn.Parameter(torch.ones(2)), grad=torch.ones(2, requires_grad=True),
    )  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_reads_as(path, torch.load(path, weights_only=False))
    entries = rankload.open_checkpoint(path).entries
    assert entries["base"].storage == entries["tied"].storage == entries["rows"].storage
    assert entries["rows"].offset == entries["base"].offset + 3 * 40 and entries["rows"].length == 80
    assert entries["base"].is_contiguous and not entries["transposed"].is_contiguous
    assert (entries["column"].length, entries["column"].size_bytes) == (4 * 91, 40)
    with path.open("rb") as file:
        file.seek(entries["rows"].offset)
        assert file.read(80) == base[3:5].numpy().tobytes()


def test_names_of_nested_content_and_what_is_no_tensor(tmp_path):
    path = tmp_path / "file"
    saved = checkpoints.training_checkpoint()
    torch.save({**saved, "range": range(3), "note": "text", "a.b": 1, "a": {"b": 2}}, path)
    with rankload.open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint.remainder["range"], Unbuilt)
        assert checkpoint.remainder["note"] == "text"
        assert (checkpoint.remainder["a.b"], checkpoint.remainder["a.b#2"]) == (1, 2)
        expected = dict(_tensors(saved))
        assert {*checkpoint} == {*expected}
        for name, tensor in checkpoint.items():
            assert_same(tensor, expected[name])


def _tensors(content, prefix=""):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        yield from _tensors(value, f"{prefix}{key}.")


def test_a_pickled_module_is_listed_and_not_built(tmp_path):
    path = tmp_path / "file"
    torch.save({"model": torch.nn.Linear(2, 3), "w": torch.ones(3)}, path)
    with rankload.open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["w"]
        assert str(checkpoint.remainder["model"].function) == "torch.nn.modules.linear.Linear"


def test_safetensors(tmp_path):
    path = tmp_path / "file"
    content = {"b": torch.randn(3, 4), "a": torch.arange(3, dtype=torch.uint8), "empty": torch.empty(0, 2)}
    save_file(content, path, metadata={"format": "pt"})
    with rankload.open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}
        assert {*checkpoint} == {*content}
        for name, tensor in checkpoint.items():
            assert_same(tensor, content[name])


def write_sharded(folder, write, suffix):
    parts = [{"a": torch.randn(2, 3), "b": torch.ones(4)}, {"c": torch.zeros(2)}]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-00002{suffix}"
        write(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    return index, {name: tensor for part in parts for name, tensor in part.items()}


@pytest.mark.parametrize(("write", "suffix"), [(save_file, ".safetensors"), (torch.save, ".bin")])
def test_hugging_face_index_of_several_files(tmp_path, write, suffix):
    index, content = write_sharded(tmp_path, write, suffix)
    assert_reads_as(index, content)
    with rankload.open_checkpoint(index) as checkpoint:
        assert checkpoint.entries["c"].file == f"model-00002-of-00002{suffix}"
        assert checkpoint.size_bytes == 48


def test_several_files_with_what_is_no_plain_tensor(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save({"w": torch.ones(2), "q": quantised, "epoch": 3, "nested": {"t": torch.zeros(1)}}, tmp_path / "one.bin")
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(["q", "epoch", "w", "nested"], "one.bin")}))
    assert [*rankload.load(index)] == ["q", "epoch", "w", "nested"]
    with rankload.open_checkpoint(index) as checkpoint:
        assert [*checkpoint] == ["w", "nested.t"] and checkpoint["nested.t"].tolist() == [0.0]
        assert checkpoint.remainder["epoch"] == 3 and isinstance(checkpoint.remainder["q"], Unbuilt)
    module = torch.nn.Module()
    module.register_buffer("w", torch.zeros(2))
    module.register_buffer("q", torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8))
    rankload.dist_load_into(module, index, strict=False)
    assert torch.equal(module.w, torch.ones(2)) and torch.equal(module.q.dequantize(), quantised.dequantize())


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../file"}}',
        '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "http://host/file"}}',
        '{"weight_map": {"a": ""}}',
    ],
)  # fmt: skip
def test_index_of_several_files_that_is_wrong(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(rankload.LoadError):
        rankload.open_checkpoint(index)


def test_index_of_several_files_of_which_one_is_missing_or_lacks_a_tensor(tmp_path):
    index, _ = write_sharded(tmp_path, save_file, ".safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(rankload.LoadError, match=r"puts 'c' in model-00002"):
        rankload.open_checkpoint(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(rankload.CacheError, match=r"model-00002-of-00002\.safetensors"):
        rankload.open_checkpoint(index)


def big_endian(path):
    """What torch.save writes on such a machine."""
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(4, dtype=torch.int32)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("/byteorder"):
                content = b"big"
            if "/data/" in member.filename:
                content = struct.pack(">4i", *struct.unpack("<4i", content))
            new.writestr(member.filename, content)


def test_elements_of_a_big_endian_machine(tmp_path):
    big_endian(tmp_path / "file")
    assert rankload.open_checkpoint(tmp_path / "file")["x"].tolist() == torch.load(tmp_path / "file")["x"].tolist()


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_every_format_is_indexed_or_says_why_not(tmp_path, name):
    file_format, write = formats.WRITERS[name]
    path = tmp_path / "file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(path)
    if file_format in ("torch_zip", "legacy", "safetensors", "single_member_zip"):
        with rankload.open_checkpoint(path) as checkpoint:
            assert {*checkpoint} == {*formats.CONTENT}
            for key, tensor in checkpoint.items():
                assert_same(tensor, formats.CONTENT[key])
    else:
        with pytest.raises(rankload.LoadError, match=r"no index|damaged|truncated"):
            rankload.open_checkpoint(path)


def rewritten(path, change):
    """A checkpoint whose pickle was changed."""
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(4.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(member.filename, change(content) if member.filename.endswith("/data.pkl") else content)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x04\x85", b"K\x05\x85"),  # a shape beyond the storage
        (b"K\x04tq", b"K\x05tq"),  # a storage beyond its record
        (b"K\x00K\x04", b"K\x01K\x04"),  # an offset that moves the end out of it
    ],
)
def test_sizes_that_are_lies_are_found_out(tmp_path, old, new):
    """torch 2.6 loads a record that is shorter than its tensor without a word."""
    path = tmp_path / "file"

    def change(content):
        assert content.count(old) == 1
        return content.replace(old, new)

    rewritten(path, change)
    with pytest.raises(rankload.LoadError, match="damaged checkpoint"):
        rankload.open_checkpoint(path)


def test_file_that_is_cut_while_it_is_open(tmp_path):
    path = tmp_path / "file"
    torch.save({"x": torch.ones(100_000)}, path)
    with rankload.open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(200_000)
        with pytest.raises(rankload.LoadError, match="ended within tensor 'x'"):
            checkpoint["x"]


def test_what_is_not_there(tmp_path):
    with pytest.raises(rankload.CacheError, match="nowhere"):
        rankload.open_checkpoint(tmp_path / "nowhere")
    torch.save({"x": torch.ones(1)}, tmp_path / "file")
    with rankload.open_checkpoint(tmp_path / "file") as checkpoint, pytest.raises(KeyError):
        checkpoint["y"]
    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(rankload.LoadError, match="no index"):
        rankload.open_checkpoint(tmp_path / "pickle")


def test_member_that_unpacks_to_more_than_it_says(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(1 << 26))
        archive.getinfo("model/data.pkl").file_size = 0  # in the directory, which is written last
    tracemalloc.start()
    try:
        with pytest.raises(rankload.LoadError):
            rankload.open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
