"""Our safetensors reader against the reference, and what the reference does not do."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankload import open_checkpoint
from rankload._load.state_dict.read_checkpoint import read_checkpoint
from rankload.errors import LoadError

DTYPES = [
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
    "float32", "float64", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip


def bits(tensor: torch.Tensor) -> list[int]:
    return list(bytes(tensor.untyped_storage()[: tensor.nbytes]))


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        ours = actual[name]
        assert (ours.dtype, ours.shape, ours.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert bits(ours) == bits(tensor), name


def every_dtype() -> dict[str, torch.Tensor]:
    """Random bits, so NaNs are among them, in three shapes of each dtype."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name in filter(functools.partial(hasattr, torch), DTYPES):  # older torches lack the newest
        dtype = getattr(torch, name)
        random = torch.randint(0, 2 if dtype == torch.bool else 256, (96,), dtype=torch.uint8, generator=generator)
        tensors[f"{name}.matrix"] = random.view(dtype).reshape(3, -1)
        tensors[f"{name}.scalar"] = random.view(dtype)[:1].clone().reshape(())
        tensors[f"{name}.empty"] = torch.empty(0, 5, dtype=dtype)
    return tensors


@pytest.mark.parametrize("mmap", [True, False])
def test_every_dtype_equals_the_reference(tmp_path, mmap):
    tensors = every_dtype()
    tensors.pop("float4_e2m1fn_x2.scalar", None)  # holds two elements
    path = tmp_path / "model.bin"
    save_file(tensors, path, metadata={"format": "pt"})
    assert_same_bits(read_checkpoint(path, mmap=mmap), load_file(path))


def write_raw(path, tensors: dict[str, tuple[str, list[int], bytes]], padding: int = 0) -> None:
    """Write a file with its header padded by any number of spaces, and names listed in reverse."""
    fields, payload = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(content)]}
        payload += content
    text = json.dumps(dict(reversed(fields.items()))).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


@pytest.mark.parametrize("padding", range(9))
@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_are_aligned_wherever_they_lie(tmp_path, padding, mmap):
    path = tmp_path / "model.safetensors"
    odd = bytes(range(1, 4))
    content = torch.arange(5, dtype=torch.float64)
    write_raw(path, {"odd": ("U8", [3], odd), "b": ("F64", [5], bytes(content.untyped_storage()))}, padding)
    loaded = read_checkpoint(path, mmap=mmap)
    assert list(loaded) == ["odd", "b"]
    assert_same_bits(loaded, load_file(path))
    assert loaded["b"].data_ptr() % 8 == 0
    loaded["b"] += 1
    assert loaded["odd"].tolist() == [1, 2, 3]


def test_a_file_without_tensors_is_an_empty_dict(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({}, path, metadata={"note": "nothing"})
    assert read_checkpoint(path) == {}


@pytest.mark.parametrize(("dtype", "bits_each"), [("F6_E2M3", 6), ("F128", 128)])
def test_a_dtype_that_torch_lacks_is_named(tmp_path, dtype, bits_each):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": ("F32", [1], bytes(4)), "odd.weight": (dtype, [8], bytes(bits_each))})
    with pytest.raises(LoadError, match=f"tensor 'odd.weight' has the dtype '{dtype}'") as caught:
        read_checkpoint(path)
    assert (caught.value.tensor, caught.value.dtype) == ("odd.weight", dtype)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no pairs of 4-bit floats")
def test_half_a_pair_is_refused_as_by_the_reference(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"even": ("F4", [2, 4], bytes(4)), "odd": ("F4", [2, 3], bytes(3))})
    with pytest.raises(SafetensorError):
        load_file(path)
    for load in (read_checkpoint, open_checkpoint):
        with pytest.raises(LoadError, match=r"'odd', F4 \[2, 3\]"):
            load(path)


def test_tensors_are_apart(tmp_path):
    """Writing to one does not reach another, and saving one does not save the file."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10_000), "b": torch.zeros(10_000)}, path)
    loaded = read_checkpoint(path)
    loaded["a"].fill_(1)
    assert not loaded["b"].any()
    torch.save(loaded["b"], tmp_path / "b.pth")
    assert (tmp_path / "b.pth").stat().st_size < 45_000
