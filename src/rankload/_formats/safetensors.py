"""The header of a safetensors file: eight bytes of length, JSON, then the tensors without gaps.

The format's own rules (huggingface/safetensors, README "Format"): the header begins with ``{`` and has at most 100 MB.
Keys are unique. The tensors cover the rest of the file with no hole and no overlap.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.entry import MAX_DIMENSIONS, are_sizes
from rankload._formats.source import Source, read_exactly

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000

#: Bits of one element. Dtypes of newer versions of the format are missing; the reader of a tensor rejects them.
BITS = MappingProxyType(
    {
        "BOOL": 8,
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
        **dict.fromkeys(("U32", "I32", "F32"), 32),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    }
)

#: torch's names of the dtypes, by the format's names.
TORCH_NAMES = MappingProxyType(
    {
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
    }
)

#: The format's names are upper case, torch's names lower case. No name of a newer version of the format may equal one
#: of torch's: the tensor's size would be unchecked.
_WORD = re.compile(r"[A-Z][A-Z0-9_]*")


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """One tensor of the file.

    Attributes:
        name: key of the tensor.
        dtype: the format's name of the dtype, such as ``"BF16"``.
        shape: sizes, in elements (two per byte for ``"F4"``).
        begin: offset of the first byte in the file.
        end: offset one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Sizes as torch counts them: ``"F4"`` elements in pairs.

        Raises:
            BrokenFileError: a pair would span two rows.
        """
        if self.dtype != "F4" or not self.shape:
            return self.shape
        *rows, size = self.shape
        if size % 2:
            raise BrokenFileError(f"safetensors file with half a pair in {self.name!r}, F4 {list(self.shape)}")
        return *rows, size // 2


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of a safetensors file.

    Attributes:
        tensors: all tensors, in the order of their bytes.
        metadata: free-form texts.
    """

    tensors: tuple[SafetensorsEntry, ...]
    metadata: dict[str, str]


def claims_to_be_safetensors(head: bytes) -> bool:
    """Return whether a file's first bytes look like safetensors: a header length below 2**48, then ``{``."""
    return head[6:9] == b"\0\0{"


def read_header(source: Source) -> SafetensorsHeader:
    """Read the header of an open file, and compare the header with the file's size.

    Raises:
        BrokenFileError: the file is truncated, or the header contradicts itself, the format or the file.
    """
    size_bytes = source.size_bytes
    length = int.from_bytes(source.read(PREFIX_BYTES, 0), "little")
    # check before allocating memory of this size
    if length > MAX_HEADER_BYTES:
        raise BrokenFileError(f"safetensors file with a header of {length} bytes (100 MB is the format's limit)")
    first_byte = PREFIX_BYTES + length
    if first_byte > size_bytes:
        raise BrokenFileError(f"truncated safetensors file ({size_bytes} bytes, its header alone has {first_byte})")
    fields = _parse(read_exactly(source, length, PREFIX_BYTES))
    metadata = _metadata(fields.pop("__metadata__", None))
    tensors = sorted(
        (_entry(name, entry, first_byte) for name, entry in fields.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    _check_cover(tensors, first_byte, size_bytes)
    return SafetensorsHeader(tuple(tensors), metadata)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except BrokenFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"safetensors file whose header is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise BrokenFileError("safetensors file whose header is not a JSON object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise BrokenFileError("safetensors file whose header has a duplicate key")
    return fields


def _metadata(fields: Any) -> dict[str, str]:
    if fields is None:
        return {}
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise BrokenFileError("safetensors file whose __metadata__ does not map strings to strings")
    return fields


def _entry(name: str, fields: Any, first_byte: int) -> SafetensorsEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        # bool is an int, and 1.0 == 1: only true integers are sizes.
        is_sound = type(dtype) is str and type(shape) is list and {type(size) for size in (begin, end, *shape)} == {int}
    except (TypeError, KeyError, ValueError):
        is_sound = False
    if not is_sound or not _WORD.fullmatch(dtype):
        raise BrokenFileError(f"safetensors file whose header has an invalid entry for {name!r}")
    if len(shape) > MAX_DIMENSIONS or not are_sizes(*shape, math.prod(filter(None, shape))):
        raise BrokenFileError(f"safetensors file in which {name!r} has sizes that no tensor can have")
    if not 0 <= begin <= end:
        raise BrokenFileError(f"safetensors file that puts {name!r} at bytes {begin} to {end}")
    if dtype in BITS and not _fits(shape, BITS[dtype], end - begin):
        raise BrokenFileError(f"safetensors file that gives {end - begin} bytes to {name!r}, {dtype} {shape}")
    return SafetensorsEntry(name, dtype, tuple(shape), first_byte + begin, first_byte + end)


def _fits(shape: list[int], bits: int, length: int) -> bool:
    if 0 in shape:
        return length == 0
    for size in shape:
        bits *= size
        # stop early: a product of huge sizes would take forever
        if bits > 8 * length:
            return False
    return bits == 8 * length


def _check_cover(tensors: list[SafetensorsEntry], first_byte: int, size_bytes: int) -> None:
    expected = first_byte
    for tensor in tensors:
        if tensor.begin != expected:
            what = "overlaps the tensor before it" if tensor.begin < expected else "leaves a gap before it"
            raise BrokenFileError(f"safetensors file in which {tensor.name!r} {what}")
        expected = tensor.end
    if expected != size_bytes:
        what = "truncated safetensors file" if expected > size_bytes else "safetensors file with bytes after its end"
        raise BrokenFileError(f"{what} ({size_bytes} bytes, its header promises {expected})")
