"""Read a safetensors file: tensors are views of one private mapping, on the devices that torch.load would choose."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch

from rankload._formats.entry import contiguous_stride
from rankload._formats.safetensors import TORCH_NAMES, SafetensorsEntry, SafetensorsHeader, read_header
from rankload._formats.source import LocalSource
from rankload._load.device.map_location import Restore
from rankload._load.values.tensors import fill
from rankload._platform.scratch import descriptor_path
from rankload.errors import LoadError

#: torch's dtypes by the format's names. Dtypes that this torch lacks are left out.
_DTYPES: MappingProxyType[str, torch.dtype] = MappingProxyType(
    {word: getattr(torch, name) for word, name in TORCH_NAMES.items() if hasattr(torch, name)}
)

#: Location tag of all tensors: the format has no tags.
_TAG = "cpu"


def read_safetensors(path: Path, restore: Restore, *, mmap: bool, display_name: str) -> dict[str, torch.Tensor]:
    """Return the tensors by name, in the order of their bytes in the file.

    Args:
        path: path of the file.
        restore: moves storages to their devices, as if they had been saved on the CPU.
        mmap: return views of a private mapping instead of private copies.
        display_name: name of the file in messages.

    Raises:
        BrokenFileError: the header does not fit the file.
        LoadError: this torch lacks a dtype, or the file ended early.
    """
    with path.open("rb", buffering=0) as file:
        source = LocalSource(file.fileno())
        header = read_header(source)
        _check_dtypes(display_name, header)
        if mmap:
            name = descriptor_path(file.fileno())  # the file that was read, even if another one has its name now
            whole = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(name, False, source.size_bytes))
            return {entry.name: _tensor(entry, restore(_view(whole, entry), _TAG)) for entry in header.tensors}
        return {entry.name: _tensor(entry, restore(_copy(source, entry), _TAG)) for entry in header.tensors}


def _check_dtypes(display_name: str, header: SafetensorsHeader) -> None:
    for entry in header.tensors:
        if entry.dtype not in _DTYPES:
            raise LoadError(
                f"{display_name}: tensor {entry.name!r} has the dtype {entry.dtype!r}, which torch {torch.__version__} "
                "does not have",
                path=display_name,
                tensor=entry.name,
                dtype=entry.dtype,
            )


def _view(whole: torch.UntypedStorage, entry: SafetensorsEntry) -> torch.UntypedStorage:
    view = whole[entry.begin : entry.end]
    # headers may have any length, but torch's kernels may rely on aligned elements
    is_aligned = entry.begin % _DTYPES[entry.dtype].itemsize == 0
    return view if is_aligned else cast(torch.UntypedStorage, view.clone())


def _copy(source: LocalSource, entry: SafetensorsEntry) -> torch.UntypedStorage:
    storage = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu").untyped_storage()
    if fill(storage, source, entry.begin) != storage.nbytes():
        raise LoadError(f"the file ended within tensor {entry.name!r}: it was truncated while it was read")
    return storage


def _tensor(entry: SafetensorsEntry, storage: torch.UntypedStorage) -> torch.Tensor:
    shape = entry.torch_shape
    empty = torch.empty(0, dtype=_DTYPES[entry.dtype], device=storage.device)
    return empty.set_(storage, 0, shape, contiguous_stride(shape))
