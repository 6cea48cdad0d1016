"""Index entries of tensors and storages: dtype, shape, strides, and byte ranges. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from types import MappingProxyType

from rankload._formats.broken import BrokenFileError

#: Bytes of one element, by torch's name of the dtype. An element of float4_e2m1fn_x2 is a pair.
ITEM_BYTES = MappingProxyType(
    {
        **dict.fromkeys(("bool", "uint8", "int8", "quint8", "qint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"), 1),
        **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
        **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
        **dict.fromkeys(("uint32", "int32", "qint32", "float32", "complex32"), 4),
        **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
        "complex128": 16,
    }
)


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """A storage in a file: bytes that one or more tensors are views of.

    Attributes:
        key: name of the storage in the file; equal keys of one file mean one storage.
        file: name of the file, relative to the checkpoint's own file.
        offset: offset of the first byte in the file.
        length: length in bytes.
        dtype: torch's name of the elements' dtype, without ``torch.``; ``"uint8"`` for an untyped storage.
        location: location tag, which map_location maps: ``"cpu"``, ``"cuda:0"``.
    """

    key: str
    file: str
    offset: int
    length: int
    dtype: str
    location: str = "cpu"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        name: key of the tensor in the checkpoint; keys of nested dicts are joined with dots.
        dtype: torch's name without ``torch.``: ``"bfloat16"``.
        shape: elements per dimension.
        stride: stride per dimension, in elements.
        storage: storage that holds the elements; tied tensors have equal storages.
        storage_offset: offset of the first element in the storage, in bytes.
        requires_grad: saved value of ``requires_grad``.
        is_parameter: whether the tensor is an ``nn.Parameter``.
        is_plain: False for a tensor of another class, or with attributes, which only torch.load restores.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: StorageEntry = field(repr=False)
    storage_offset: int = 0
    requires_grad: bool = False
    is_parameter: bool = False
    is_plain: bool = True

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        if self.dtype not in ITEM_BYTES:  # see `length`
            return self.storage.length
        return self.element_count * self.item_bytes

    @property
    def file(self) -> str:
        """Name of the tensor's file."""
        return self.storage.file

    @property
    def storage_key(self) -> str:
        """Name of the storage in the file."""
        return self.storage.key

    @property
    def offset(self) -> int:
        """Offset of the tensor's first byte in the file."""
        return self.storage.offset + self.storage_offset

    @property
    def length(self) -> int:
        """Bytes from the first element to the last, including any gaps."""
        if self.dtype not in ITEM_BYTES:  # a dtype of a newer format, whose size is unknown: use the whole storage
            return self.storage.length
        return span_bytes(self.shape, self.stride, self.item_bytes)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other, in order."""
        return self.length == self.size_bytes and all(
            size == 1 or stride == expected
            for size, stride, expected in zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        )

    def named(self, name: str) -> TensorEntry:
        """Return the entry with another name."""
        return replace(self, name=name)


#: torch's own limits.
MAX_DIMENSIONS = 64
_MAX_SIZE = (1 << 63) - 1


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def span_bytes(shape: Sequence[int], stride: Sequence[int], item_bytes: int) -> int:
    """Return the bytes from the first element of a view to the last."""
    if 0 in shape:
        return 0
    last: int = sum(map(mul, shape, stride)) - sum(stride)  # the sum of (size - 1) * step
    return (last + 1) * item_bytes


def are_sizes(*numbers: int) -> bool:
    """Return whether all numbers are valid sizes: not negative, and within torch's signed 64 bits."""
    return not numbers or (min(numbers) >= 0 and max(numbers) <= _MAX_SIZE)


def checked(entry: TensorEntry) -> TensorEntry:
    """Return a tensor's entry if the tensor lies within its storage.

    Raises:
        BrokenFileError: the tensor reaches beyond its storage, into bytes of something else.
    """
    end = entry.storage_offset + entry.length
    are_sound = entry.storage_offset >= 0 and are_sizes(entry.element_count, *entry.shape, *entry.stride)
    if not are_sound or end > entry.storage.length:
        raise BrokenFileError(
            f"damaged checkpoint (a tensor of shape {list(entry.shape)} reaches beyond storage {entry.storage.key!r})"
        )
    return entry
