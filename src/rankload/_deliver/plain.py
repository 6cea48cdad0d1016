"""Checkpoints of torch's zip format that hold tensors and plain values only: mapped, and built from their index.

torch.load makes the same of them; of 84 tensors, the first time, in 9 ms instead of 3.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch._guards import TracingContext
from torch.serialization import get_default_load_endianness

from rankload._checkpoint.entry import TensorEntry
from rankload._checkpoint.index import FileIndex
from rankload._checkpoint.pickle_values import NotUnderstoodError
from rankload._checkpoint.source import LocalSource
from rankload._checkpoint.torch_zip import LOCAL_SIGNATURE
from rankload._checkpoint.zip_index import read_zip_index
from rankload._deliver.exact import built
from rankload._deliver.restore import Restore
from rankload._deliver.tensors import tensor_on, torch_dtype
from rankload._errors import CacheError
from rankload._scratch import descriptor_path

#: Tensors are mapped only where each of their elements is aligned, for torch's kernels: the longest are complex128's.
ALIGNMENT_BYTES = 16

_SCALARS = frozenset({str, bytes, int, float, bool, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple})


class PlainCheckpoint:
    """Such a file, mapped: its index is known, and nothing is built yet.

    Args:
        path: the file.
        shown: what messages call it.

    Raises (the constructor):
        NotUnderstoodError: it is none, or its tensors cannot be mapped: torch.load knows what to do.
        BrokenFileError: it contradicts its format.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, shown: str) -> None:
        self._shown = shown
        with path.open("rb", buffering=0) as file:
            source = LocalSource(file.fileno())
            if source.read(len(LOCAL_SIGNATURE), 0) != LOCAL_SIGNATURE:
                raise NotUnderstoodError("another format")
            index = read_zip_index(source, path.name, is_remote=False, exactly=True)
            _check_torch_would_agree(index)
            self._top, self._storages = [index.content], index.storages
            self._places = list(_places_of_tensors(self._top))
            self._file = _mapped(file.fileno(), source.size_bytes)

    def build(self, restore: Restore) -> Any:
        """Return what was saved, with its tensors on a private mapping of the file, or where they are put instead.

        Once only: the index becomes that.
        """
        storages = {
            entry.key: restore(self._file[entry.offset : entry.offset + entry.length], entry.location)
            for entry in self._storages
        }
        tensors: dict[int, torch.Tensor] = {}
        for container, key, entry in self._places:
            if id(entry) not in tensors:
                dtype = torch_dtype(entry, self._shown)
                tensors[id(entry)] = tensor_on(storages[entry.storage_key], entry, dtype, entry.storage_offset)
            container[key] = tensors[id(entry)]
        return self._top[0]


def _mapped(descriptor: int, size_bytes: int) -> torch.UntypedStorage:
    try:
        # the file that was read, whatever its name stands for by now
        storage = torch.UntypedStorage.from_file(descriptor_path(descriptor), False, size_bytes)
    except (RuntimeError, CacheError) as error:
        raise NotUnderstoodError(f"it cannot be mapped so: {error}") from error
    return cast(torch.UntypedStorage, storage)


def _check_torch_would_agree(index: FileIndex) -> None:
    """Raise NotUnderstoodError where torch.load would make something else of the same index."""
    if torch._C._len_torch_dispatch_stack() or TracingContext.try_get() is not None:
        raise NotUnderstoodError("within a mode that makes fake tensors, or watches")
    if any(entry.offset % ALIGNMENT_BYTES for entry in index.storages):
        raise NotUnderstoodError("tensors that are not aligned")
    if index.byte_order is None and get_default_load_endianness() is not None:
        raise NotUnderstoodError("elements of which the caller knows the byte order")
    if (index.byte_order or "little") != sys.byteorder:
        raise NotUnderstoodError("elements whose bytes have to be swapped")
    if not index.is_exact:
        raise NotUnderstoodError("objects that only torch.load makes exactly")


def _places_of_tensors(top: list[Any]) -> Iterator[tuple[Any, Any, TensorEntry]]:
    """Yield each list or dict with a tensor in it, the index or key of that, and the tensor's entry.

    Raises:
        NotUnderstoodError: there is something else than plain values, and tensors of dtypes that this torch has.
    """
    seen: set[int] = set()
    rest: list[Any] = [top]
    while rest:
        container = rest.pop()
        if id(container) in seen:  # containers may hold each other
            continue
        seen.add(id(container))
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            kind = type(value)
            if kind in _CONTAINERS:
                rest.append(value)
            elif kind not in _SCALARS:
                if type(container) is tuple:
                    raise NotUnderstoodError(f"a {kind.__name__} in a tuple")
                if kind is TensorEntry and value.dtype in vars(torch):
                    yield container, key, value
                else:
                    container[key] = made = built(value)
                    if made is value:
                        raise NotUnderstoodError(f"a {kind.__name__}")
        if (metadata := getattr(container, "_metadata", None)) is not None:
            rest.append(metadata)
