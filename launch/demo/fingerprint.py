"""One digest of everything that a checkpoint holds, to compare ranks, and the two ways, bit by bit."""

import ctypes
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def fingerprint(content: Any) -> str:
    """Full hex SHA-256 of all names, shapes, dtypes and bytes, in order. Reads every page of every tensor."""
    digest = hashlib.sha256()
    for name, value in _leaves("", content):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            _update(digest, value)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def tensor_bytes(content: Any) -> int:
    """The size of all tensors in a checkpoint; a storage that several of them share counts once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for _, value in _leaves("", content)
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}.{index}", inner)
    else:
        yield name, value


def _update(digest: Any, tensor: torch.Tensor) -> None:
    resident = tensor.detach().cpu().contiguous()
    size_bytes = resident.numel() * resident.element_size()
    if size_bytes:
        # Straight from the tensor's memory: numpy knows no bfloat16 and need not be installed.
        digest.update((ctypes.c_char * size_bytes).from_address(resident.data_ptr()))
