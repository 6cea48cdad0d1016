"""Read one tensor out of a file, given its entry."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from rankload._formats.entry import ITEM_BYTES, TensorEntry
from rankload._formats.index import ByteOrder
from rankload._formats.source import LocalSource, Source
from rankload.errors import LoadError


def read_tensor(source: Source, entry: TensorEntry, byte_order: ByteOrder, display_name: str) -> torch.Tensor:
    """Read only a tensor's own bytes into a new tensor on the CPU, with its saved shape and strides.

    Raises:
        LoadError: this torch lacks the dtype, there is not enough memory, or the file ended early.
    """
    dtype = torch_dtype(entry, display_name)
    try:
        storage = torch.empty(entry.length, dtype=torch.uint8, device="cpu").untyped_storage()
    except RuntimeError as error:
        text = f"{display_name}: not enough memory for tensor {entry.name!r} of {entry.length} bytes"
        raise LoadError(text, tensor=entry.name, size_bytes=entry.length) from error
    if fill(storage, source, entry.offset) != entry.length:
        raise LoadError(
            f"{display_name}: the file ended within tensor {entry.name!r}: it was truncated after it was opened"
        )
    if byte_order != sys.byteorder:
        storage.byteswap(dtype)  # type: ignore[no-untyped-call]
    return tensor_on(storage, entry, dtype, 0)


def tensor_on(storage: torch.UntypedStorage, entry: TensorEntry, dtype: torch.dtype, offset_bytes: int) -> torch.Tensor:
    """Return a saved tensor as a view of a storage, from an offset in bytes on."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, offset_bytes // dtype.itemsize, entry.shape, entry.stride)
    requires_grad = entry.requires_grad and (dtype.is_floating_point or dtype.is_complex)  # other dtypes cannot
    if entry.is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor


def torch_dtype(entry: TensorEntry, display_name: str) -> torch.dtype:
    """Return a tensor's dtype.

    Raises:
        LoadError: this torch lacks the dtype.
    """
    # vars(): getattr would import submodules. ITEM_BYTES: sizes were checked only for these names of dtypes.
    dtype = vars(torch).get(entry.dtype) if entry.dtype in ITEM_BYTES else None
    if not isinstance(dtype, torch.dtype):
        what = f"tensor {entry.name!r} has the dtype {entry.dtype!r}"
        text = f"{display_name}: {what}, which torch {torch.__version__} does not have"
        raise LoadError(text, tensor=entry.name, dtype=entry.dtype)
    return dtype


def fill(storage: torch.UntypedStorage, source: Source, offset: int) -> int:
    """Fill a storage in memory with bytes from an offset on; return the number of bytes found."""
    return fill_memory(storage.data_ptr(), storage.nbytes(), source, offset)


def fill_memory(address: int, length: int, source: Source, offset: int) -> int:
    """Fill memory with bytes from an offset on; return the number of bytes found."""
    if not length:
        return 0
    # read straight into place: no second copy in memory, and no numpy for a view of the memory
    rest = memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
    if not isinstance(source, LocalSource):
        found = source.read(length, offset)
        rest[: len(found)] = found
        return len(found)
    while rest and (count := os.preadv(source.descriptor, [rest], offset + length - len(rest))):
        rest = rest[count:]
    return length - len(rest)
