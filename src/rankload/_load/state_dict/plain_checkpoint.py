"""Build the content of a torch zip file from its index, if that is only tensors and plain values.

The index is read in any case, since torch.load checks nothing in a file that it maps. For 84 tensors, building takes
1 ms; torch.load, which reads the pickle again, takes 11.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch._guards import TracingContext
from torch.serialization import get_default_load_endianness

from rankload._formats.entry import TensorEntry
from rankload._formats.index import FileIndex
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.source import LocalSource
from rankload._formats.torch_zip import read_zip_index
from rankload._load.device.map_location import Restore
from rankload._load.state_dict.torch_load_checks import ALIGNMENT_BYTES
from rankload._load.values.tensors import tensor_on, torch_dtype
from rankload._load.values.torch_values import built
from rankload._platform.scratch import descriptor_path
from rankload.errors import CacheError

_SCALARS = frozenset({str, bytes, int, float, bool, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple})


class PlainCheckpoint:
    """A mapped checkpoint of torch's zip format, whose index has been read, and which is not built yet.

    Args:
        source: the file.
        display_name: name of the file in messages.

    Raises (the constructor):
        NotUnderstoodError: only torch.load can load the file: it contains more than tensors and plain values, or cannot
            be mapped.
        BrokenFileError: the file contradicts its format.
    """

    def __init__(self, source: LocalSource, display_name: str) -> None:
        self._display_name = display_name
        index = read_zip_index(source, display_name, is_remote=False, exactly=True)
        _check_torch_would_agree(index)
        self._top, self._storages = [index.content], index.storages
        self._slots = list(_slots_of_tensors(self._top))
        self._file = _mapped(source)

    def build(self, restore: Restore) -> Any:
        """Build and return the saved content. Call this only once: the index is reused for the result.

        Args:
            restore: moves each storage of a private mapping to its device.
        """
        storages = {
            entry.key: restore(self._file[entry.offset : entry.offset + entry.length], entry.location)
            for entry in self._storages
        }
        tensors: dict[int, torch.Tensor] = {}
        for container, key, entry in self._slots:
            if id(entry) not in tensors:
                dtype = torch_dtype(entry, self._display_name)
                tensors[id(entry)] = tensor_on(storages[entry.storage_key], entry, dtype, entry.storage_offset)
            container[key] = tensors[id(entry)]
        return self._top[0]


def _mapped(source: LocalSource) -> torch.UntypedStorage:
    try:
        # by descriptor: map the file that was read, even if another one has its name now
        storage = torch.UntypedStorage.from_file(descriptor_path(source.descriptor), False, source.size_bytes)
    except (RuntimeError, CacheError) as error:
        raise NotUnderstoodError(f"a file that cannot be mapped: {error}") from error
    return cast(torch.UntypedStorage, storage)


def _check_torch_would_agree(index: FileIndex) -> None:
    """Raise NotUnderstoodError if torch.load would return something else for the same index."""
    if torch._C._len_torch_dispatch_stack() or TracingContext.try_get() is not None:
        raise NotUnderstoodError("a dispatch or tracing mode, such as one for fake tensors, is active")
    if any(entry.offset % ALIGNMENT_BYTES for entry in index.storages):
        raise NotUnderstoodError("tensors that are not aligned")
    if index.byte_order is None and get_default_load_endianness() is not None:
        raise NotUnderstoodError("elements in the default byte order that the caller has set")
    if (index.byte_order or "little") != sys.byteorder:
        raise NotUnderstoodError("elements whose bytes have to be swapped")
    if not index.is_exact:
        raise NotUnderstoodError("objects that only torch.load builds exactly")


def _slots_of_tensors(top: list[Any]) -> Iterator[tuple[Any, Any, TensorEntry]]:
    """Yield the container (list or dict), the index or key, and the entry of each tensor. Build torch's plain values.

    Raises:
        NotUnderstoodError: the content has other objects, or dtypes that this torch lacks, or an object in a tuple.
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
