"""Assemble tensors from the pieces of a byte stream."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from typing_extensions import override

from rankload._formats.entry import TensorEntry, contiguous_stride
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.regions import Region, intersection, regions_of_range, whole
from rankload._load.streams.buckets import Bucket
from rankload.errors import LoadError


class TensorAssembler(ABC):
    """The assembly of one tensor from consecutive pieces, into this rank's part.

    Attributes:
        begin: offset of the tensor in its file, in bytes.
        end: offset one past its last byte.
    """

    begin: int
    end: int

    @abstractmethod
    def take(self, begin: int, piece: torch.Tensor) -> None:
        """Take the next piece of the tensor.

        Args:
            begin: offset of the piece in the file, in bytes.
            piece: bytes of the tensor, ``uint8[n]``; valid until the next call.
        """

    def finish(self) -> None:  # noqa: B027 - most assemblers have nothing left to do
        """Finish the tensor, after its last piece."""


def make_assembler(copy: TensorCopy, cuts: Sequence[int]) -> TensorAssembler:
    """Return the assembler for a copy out of a file.

    Args:
        copy: copy of a tensor that is in a file.
        cuts: offsets in the file, in bytes, at which the tensor is cut into pieces.
    """
    saved = copy.saved.in_file
    assert saved is not None
    item_bytes = saved.dtype.itemsize
    order = _order(saved.entry.shape, saved.entry.stride)
    is_cut_between_elements = all((cut - saved.entry.offset) % item_bytes == 0 for cut in cuts)
    if order is None or not saved.is_native or not is_cut_between_elements:
        return _Whole(copy, saved)
    return _Parts(copy, saved, order)


class _Parts(TensorAssembler):
    """The assembler for a dense tensor, with its dimensions in any order."""

    def __init__(self, copy: TensorCopy, saved: FileTensor, order: Sequence[int]) -> None:
        self.begin, self.end = saved.entry.offset, saved.entry.offset + saved.entry.length
        self._saved_dtype, self._dtype = saved.dtype, copy.saved.dtype
        self._shape, offset, shape = (
            tuple(sizes[dimension] for dimension in order)
            for sizes in (saved.entry.shape, copy.region.offset, copy.region.shape)
        )
        self._region = Region(offset, shape)
        self._destination = copy.destination.permute(tuple(order))

    @override
    def take(self, begin: int, piece: torch.Tensor) -> None:
        elements = _elements(piece, self._saved_dtype).to(self._dtype)
        first = (begin - self.begin) // self._saved_dtype.itemsize
        for region, start in regions_of_range(self._shape, first, first + elements.numel()):
            if (common := intersection(region, self._region)) is None:
                continue
            part = elements.narrow(0, start - first, region.element_count).view(region.shape)
            narrowed(self._destination, self._region, common).copy_(narrowed(part, region, common))


class _Whole(TensorAssembler):
    """The assembler for a tensor that can be converted only as a whole: it buffers all pieces."""

    def __init__(self, copy: TensorCopy, saved: FileTensor) -> None:
        self.begin, self.end = saved.entry.offset, saved.entry.offset + saved.entry.length
        self._copy, self._saved = copy, saved
        self._bytes: torch.Tensor | None = None

    @override
    def take(self, begin: int, piece: torch.Tensor) -> None:
        if self._bytes is None:
            self._bytes = torch.empty(self.end - self.begin, dtype=torch.uint8, device="cpu")
        self._bytes.narrow(0, begin - self.begin, piece.numel()).copy_(piece)

    @override
    def finish(self) -> None:
        assert self._bytes is not None
        saved, region = self._saved, self._copy.region
        storage = self._bytes.untyped_storage()
        if saved.byte_order != sys.byteorder:
            storage.byteswap(saved.dtype)  # type: ignore[no-untyped-call]
        part = torch.empty(0, dtype=saved.dtype, device="cpu").set_(storage, 0, saved.entry.shape, saved.entry.stride)
        part = narrowed(part, whole(saved.entry.shape), region).to(self._copy.saved.dtype)
        self._copy.destination.copy_(part)
        self._bytes = None


class TensorAssemblers:
    """The assemblers of all copies, for buckets in the order of `buckets.cut`."""

    def __init__(self, copies: Sequence[TensorCopy], buckets: Sequence[Bucket]) -> None:
        self._rest: dict[str, list[TensorAssembler]] = {}
        begins: dict[str, list[int]] = {}
        for bucket in buckets:
            begins.setdefault(bucket.file, []).append(bucket.begin)
        for copy in sorted(copies, key=lambda copy: copy.saved.position, reverse=True):
            file, begin = copy.saved.position
            saved = copy.saved.in_file
            if copy.region.element_count and saved is not None:
                own = begins.get(file, [])
                cuts = own[bisect_right(own, begin) : bisect_left(own, begin + saved.entry.length)]
                self._rest.setdefault(file, []).append(make_assembler(copy, cuts))
        self._open: list[TensorAssembler] = []

    def take(self, bucket: Bucket, content: torch.Tensor) -> None:
        """Pass a bucket's bytes (``uint8[n]``) to the assemblers of its tensors."""
        rest = self._rest.get(bucket.file, [])
        while rest and rest[-1].begin < bucket.end:
            self._open.append(rest.pop())
        still_open = []
        for assembler in self._open:
            begin, end = max(assembler.begin, bucket.begin), min(assembler.end, bucket.end)
            assembler.take(begin, content.narrow(0, begin - bucket.begin, end - begin))
            if end == assembler.end:
                assembler.finish()
            else:
                still_open.append(assembler)
        self._open = still_open

    def check_empty(self) -> None:
        """Check that all tensors are complete.

        Raises:
            LoadError: bytes are missing.
        """
        if self._open or any(self._rest.values()):
            raise LoadError("the source did not send all tensors of this rank")


def narrowed(tensor: torch.Tensor, its_region: Region, region: Region) -> torch.Tensor:
    """Return the part of a tensor that a region covers.

    Args:
        tensor: elements of ``its_region``.
        its_region: region that ``tensor`` covers.
        region: wanted region, within ``its_region``.
    """
    for dimension, (start, origin, size) in enumerate(zip(region.offset, its_region.offset, region.shape, strict=True)):
        tensor = tensor.narrow(dimension, start - origin, size)
    return tensor


def is_dense(entry: TensorEntry) -> bool:
    """Return whether a tensor's elements are consecutive in memory, in some order of its dimensions."""
    return _order(entry.shape, entry.stride) is not None


def _order(shape: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """Return the order of dimensions in which the elements are consecutive; None if there is none."""
    order = sorted(range(len(shape)), key=lambda dimension: (-stride[dimension], dimension))
    dense = contiguous_stride([shape[dimension] for dimension in order])
    fits = all(shape[dimension] == 1 or stride[dimension] == step for dimension, step in zip(order, dense, strict=True))
    return order if fits else None


def _elements(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as elements; copy them first if they are not aligned."""
    if piece.data_ptr() % dtype.itemsize or piece.storage_offset() % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype)
