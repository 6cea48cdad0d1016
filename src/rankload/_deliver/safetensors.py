"""Materialise a safetensors file: tensors are views of one private mapping of it, placed as by torch.load."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.serialization import default_restore_location

from rankload._checkpoint.safetensors import Header, TensorEntry, read_header
from rankload._errors import LoadError

#: torch's dtypes by the format's words; those that this torch does not have are left out.
_DTYPES: MappingProxyType[str, torch.dtype] = MappingProxyType(
    {
        word: getattr(torch, name)
        for word, name in {
            "BOOL": "bool",
            "U8": "uint8",
            "U16": "uint16",
            "U32": "uint32",
            "U64": "uint64",
            "I8": "int8",
            "I16": "int16",
            "I32": "int32",
            "I64": "int64",
            "F4": "float4_e2m1fn_x2",
            "F8_E4M3": "float8_e4m3fn",
            "F8_E4M3FNUZ": "float8_e4m3fnuz",
            "F8_E5M2": "float8_e5m2",
            "F8_E5M2FNUZ": "float8_e5m2fnuz",
            "F8_E8M0": "float8_e8m0fnu",
            "F16": "float16",
            "BF16": "bfloat16",
            "F32": "float32",
            "F64": "float64",
            "C64": "complex64",
        }.items()
        if hasattr(torch, name)
    }
)

_Place = Callable[[torch.UntypedStorage], torch.UntypedStorage]
_to_location: Callable[[torch.UntypedStorage, str], torch.UntypedStorage] = default_restore_location


def read_safetensors(path: Path, map_location: Any, *, mmap: bool) -> dict[str, torch.Tensor]:
    """Return the tensors by name, in the order in which they lie in the file.

    Args:
        path: the file.
        map_location: any form that torch.load takes; the file's tensors are tagged ``"cpu"``.
        mmap: views of a private mapping; otherwise private copies.

    Raises:
        BrokenFileError: the header does not fit the file.
        LoadError: this torch has no such dtype.
    """
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        header = read_header(file.fileno(), size_bytes)
        _check_dtypes(path, header)
        place = _placer(map_location)
        if mmap:
            whole = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, size_bytes))
            return {entry.name: _tensor(entry, place(_view(whole, entry))) for entry in header.tensors}
        return {entry.name: _tensor(entry, place(_copy(file.fileno(), entry))) for entry in header.tensors}


def _check_dtypes(path: Path, header: Header) -> None:
    for entry in header.tensors:
        if entry.dtype not in _DTYPES:
            raise LoadError(
                f"{path}: tensor {entry.name!r} has the dtype {entry.dtype!r}, which torch {torch.__version__} "
                "does not have",
                path=str(path),
                tensor=entry.name,
                dtype=entry.dtype,
            )


def _placer(map_location: Any) -> _Place:
    """Give torch.load's meaning to its argument, for storages that were saved on the CPU."""
    if callable(map_location):
        # As for torch.load, None means: as if there were no map_location.
        return lambda storage: storage if (placed := map_location(storage, "cpu")) is None else placed
    if isinstance(map_location, dict):
        location = map_location.get("cpu", "cpu")
    else:
        location = "cpu" if map_location is None else str(map_location)
    return lambda storage: _to_location(storage, location)


def _view(whole: torch.UntypedStorage, entry: TensorEntry) -> torch.UntypedStorage:
    view = whole[entry.begin : entry.end]
    # Headers of any length are legal; kernels may rely on whole elements at whole addresses.
    is_aligned = entry.begin % _DTYPES[entry.dtype].itemsize == 0
    return view if is_aligned else cast(torch.UntypedStorage, view.clone())


def _copy(descriptor: int, entry: TensorEntry) -> torch.UntypedStorage:
    length = entry.end - entry.begin
    storage = torch.empty(length, dtype=torch.uint8).untyped_storage()
    # Straight into the storage: neither a second copy in memory, nor numpy for a view of it.
    rest = memoryview((ctypes.c_ubyte * length).from_address(storage.data_ptr())) if length else memoryview(b"")
    while rest:
        count = os.preadv(descriptor, [rest], entry.end - len(rest))
        if count == 0:
            raise LoadError(f"the file ended within tensor {entry.name!r}: it was truncated while being read")
        rest = rest[count:]
    return storage


def _tensor(entry: TensorEntry, storage: torch.UntypedStorage) -> torch.Tensor:
    dtype, shape = _DTYPES[entry.dtype], entry.shape
    if entry.dtype == "F4" and shape:
        shape = (*shape[:-1], shape[-1] // 2)  # torch counts pairs
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, 0, shape, _contiguous_strides(shape))


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))
