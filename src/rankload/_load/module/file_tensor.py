"""Lazy tensors whose elements are in a file (see `lazy_tensor`)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from operator import mul
from typing import Any

import torch
from typing_extensions import override

from rankload._formats.entry import TensorEntry, span_bytes
from rankload._formats.index import ByteOrder
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.lazy_tensor import Assignment, LazyTensor
from rankload._load.module.regions import Region, Runs, runs
from rankload._load.module.slots import holds_plain_elements
from rankload._load.values.tensors import read_tensor, tensor_on, torch_dtype

#: Shorter runs are copied from the mapped file: a system call costs more than the copy of so few bytes.
_MIN_RUN_BYTES = 4096

#: If the file must not be mapped, this much of it is read at a time, and the short runs are copied out of that.
_ROWS_BYTES = 8 << 20


class FileTensor(LazyTensor):
    """A lazy tensor whose elements are still in the file.

    Attributes:
        entry: index entry of the tensor.
        byte_order: byte order of the elements in the file.
        files: files of the checkpoint.

    Raises (the constructor):
        LoadError: this torch lacks the tensor's dtype.
    """

    def __init__(
        self,
        entry: TensorEntry,
        files: CheckpointFiles,
        byte_order: ByteOrder,
        assignments: list[Assignment],
        display_name: str,
    ) -> None:
        super().__init__(torch.Size(entry.shape), torch_dtype(entry, display_name), assignments)
        self.entry, self.byte_order, self.files = entry, byte_order, files
        self.is_plain = entry.is_plain
        self._display_name = display_name
        self._exact: torch.Tensor | None = None

    @override
    def exact(self) -> torch.Tensor:
        """Return what torch.load returns: a view of the mapped file if possible. Tied tensors share one storage."""
        if self._made is not None:
            return self._made
        if self._exact is None:
            entry = self.entry
            self.files.note_use(entry)
            if self.is_native:
                self._exact = tensor_on(self.files.storage(entry), entry, self.dtype, entry.storage_offset)
            else:
                self._exact = read_tensor(self.files.source(entry.file), entry, self.byte_order, self._display_name)
        return self._exact

    @property
    @override
    def in_file(self) -> FileTensor | None:
        return self if self._made is None else None

    @property
    @override
    def position(self) -> tuple[str, int]:
        return (self.entry.file, self.entry.offset) if self._made is None else super().position

    @property
    @override
    def is_here(self) -> bool:
        return self._made is not None or self.files.has(self.entry)

    @property
    def is_native(self) -> bool:
        """Whether the elements have this machine's byte order."""
        return self.byte_order == sys.byteorder

    @property
    def _is_mappable(self) -> bool:
        return self.files.may_map and self.is_native and not self.entry.offset % self.entry.item_bytes

    @override
    def view(self) -> torch.Tensor:
        if self._made is not None:
            return self._made
        entry = self.entry
        self.files.note_use(entry)
        if not self._is_mappable or not entry.length:
            return read_tensor(self.files.source(entry.file), entry, self.byte_order, self._display_name).detach()
        storage: Any = self.files.mapping(entry.file)[entry.offset : entry.offset + entry.length]
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, 0, entry.shape, entry.stride)

    @override
    def reader(self, destination: torch.Tensor, region: Region) -> Callable[[], int]:
        """Return the function that fills a tensor; it reads straight into the destination if the layouts match."""
        is_alike = self.is_native and destination.dtype == self.dtype and self._made is None
        is_alike = is_alike and destination.device.type == "cpu" and holds_plain_elements(destination)
        if is_alike and (parts := self.long_runs(region)) is not None:
            return functools.partial(self._read_runs, parts, destination)
        is_part = region.shape != self.entry.shape and region.element_count
        if is_part and self._made is None and self.is_native and not self._is_mappable:
            return functools.partial(self._read_rows, region, destination)
        return super().reader(destination, region)

    def long_runs(self, region: Region) -> Runs | None:
        """Return the runs of a region, if each is worth its own system call, or the region is one run; else None."""
        if not self.entry.is_contiguous:
            return None
        parts = runs(self.entry.shape, region)
        is_long = parts.length == region.element_count or parts.length * self.dtype.itemsize >= _MIN_RUN_BYTES
        return parts if is_long else None

    def _read_runs(self, parts: Runs, destination: torch.Tensor) -> int:
        item_bytes, position = self.dtype.itemsize, destination.data_ptr()
        length = parts.length * item_bytes
        for start in parts.starts:
            self.read_bytes(position, self.entry.offset + start * item_bytes, length)
            position += length
        return position - destination.data_ptr()

    def _read_rows(self, region: Region, destination: torch.Tensor) -> int:
        """Read some rows of a region at a time, from their first element to their last, and copy the elements."""
        entry, item_bytes = self.entry, self.dtype.itemsize
        origin = sum(map(mul, region.offset, entry.stride))
        count = max(1, _ROWS_BYTES // max(1, entry.stride[0] * item_bytes))
        for row in range(0, region.shape[0], count):
            shape = (min(count, region.shape[0] - row), *region.shape[1:])
            content = torch.empty(span_bytes(shape, entry.stride, item_bytes), dtype=torch.uint8, device="cpu")
            offset = entry.offset + (origin + row * entry.stride[0]) * item_bytes
            self.read_bytes(content.data_ptr(), offset, content.numel())
            part = content.view(self.dtype).as_strided(shape, entry.stride)
            destination.narrow(0, row, shape[0]).copy_(part)
        return region.element_count * item_bytes

    def read_bytes(self, address: int, offset: int, length: int) -> None:
        """Read bytes of the file to an address in memory.

        Raises:
            LoadError: the file ended early.
            CacheError: the file cannot be read.
        """
        self.files.read(self.entry.file, address, offset, length, what=f"tensor {self.entry.name!r}")
