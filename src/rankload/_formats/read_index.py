"""Read the index of a checkpoint of any format, in one file or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from rankload._formats import safetensors
from rankload._formats import torch_legacy as legacy
from rankload._formats import zip_archive as torch_zip
from rankload._formats.broken import BrokenFileError
from rankload._formats.entry import StorageEntry, TensorEntry, checked, contiguous_stride
from rankload._formats.index import FileIndex, Index, flatten
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.sharded import claims_to_be_json, read_weight_map
from rankload._formats.source import Source
from rankload._formats.torch_zip import read_zip_index

_HEAD_BYTES = 1024

Value = TypeVar("Value")

#: Open a part of a checkpoint by its file name.
OpenPart = Callable[[str], Source]


def read_index(source: Source, file: str, open_part: OpenPart, *, is_remote: bool) -> Index:
    """Read the index of a checkpoint; no tensor is read.

    Args:
        source: the checkpoint's file, or the ``*.index.json`` of a checkpoint in several files.
        file: name of that file.
        open_part: opens the other files.
        is_remote: whether each read costs a round trip.

    Raises:
        BrokenFileError: a file contradicts its format.
        NotUnderstoodError: the format has no index, or only torch.load can read the file.
    """
    if claims_to_be_json(source.read(_HEAD_BYTES, 0)):
        return _sharded(read_weight_map(source), open_part, is_remote=is_remote)
    return _one(source, file, is_remote=is_remote)


def _one(source: Source, file: str, *, is_remote: bool) -> Index:
    head = source.read(_HEAD_BYTES, 0)
    if head.startswith(torch_zip.LOCAL_SIGNATURE):
        return flatten(read_zip_index(source, file, is_remote=is_remote), file)
    if legacy.claims_to_be_legacy(head):
        return flatten(legacy.read_legacy_index(source, file), file)
    if safetensors.claims_to_be_safetensors(head):
        return _of_header(safetensors.read_header(source), file)
    raise NotUnderstoodError("a file of another format")


def _sharded(weight_map: dict[str, str], open_part: OpenPart, *, is_remote: bool) -> Index:
    """Merge the indexes of the parts, in the order of the weight map."""
    parts = {file: _one(open_part(file), file, is_remote=is_remote) for file in sorted(set(weight_map.values()))}
    content: dict[str, Any] = {}
    for name, file in weight_map.items():
        of_part = parts[file].content
        if not isinstance(of_part, dict) or name not in of_part:
            raise BrokenFileError(f"index of a sharded checkpoint that puts {name!r} in {file}, which lacks the tensor")
        value = of_part[name]
        content[name] = value.named(name) if isinstance(value, TensorEntry) else value
    return replace(
        flatten(FileIndex(content), ""),
        byte_orders=_merged(part.byte_orders for part in parts.values()),
        metadata=_merged(part.metadata for part in parts.values()),
        storages=tuple(storage for part in parts.values() for storage in part.storages),
        is_exact=all(part.is_exact for part in parts.values()),
        confirm=lambda storage: parts[storage.file].confirm(storage),
    )


def _merged(parts: Iterable[Mapping[str, Value]]) -> Mapping[str, Value]:
    return MappingProxyType({name: value for part in parts for name, value in part.items()})


def _of_header(header: safetensors.SafetensorsHeader, file: str) -> Index:
    tensors = {}
    for found in header.tensors:
        dtype = safetensors.TORCH_NAMES.get(found.dtype, found.dtype)
        storage = StorageEntry(found.name, file, found.begin, found.end - found.begin, dtype)
        shape = found.torch_shape
        tensors[found.name] = checked(TensorEntry(found.name, dtype, shape, contiguous_stride(shape), storage))
    return Index(
        MappingProxyType(tensors),
        MappingProxyType({}),
        MappingProxyType({file: "little"}),
        MappingProxyType(header.metadata),
        content=dict(tensors),
        storages=tuple(tensor.storage for tensor in tensors.values()),
    )
