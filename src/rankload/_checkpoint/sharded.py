"""Hugging Face's index of a checkpoint in several files: ``model.safetensors.index.json``.

JSON: ``{"metadata": {...}, "weight_map": {tensor name: file name}}`` (huggingface_hub, "split_torch_state_dict").
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from rankload._checkpoint.broken import BrokenFileError
from rankload._checkpoint.source import Source, read_exactly

_HEAD_BYTES = 64

#: The index of a million tensors has about 100 MB.
_LARGEST_BYTES = 1 << 28


def claims_to_be_json(head: bytes) -> bool:
    """Say whether what begins so may be such an index. Never by its name: a cached file may have any."""
    return head.lstrip()[:1] == b"{" and b"\0" not in head


def has_weight_map(source: Source) -> bool:
    """Say whether a file is such an index, be it a damaged one, by all of its content."""
    if not claims_to_be_json(source.read(_HEAD_BYTES, 0)):
        return False
    try:
        _weight_map(source)
    except BrokenFileError:
        return False
    return True


def part_names(source: Source) -> list[str]:
    """Return the names of the files that an index is of, sorted.

    Raises:
        BrokenFileError: it is no such index, or names a file that is not beside it.
    """
    return sorted(set(read_weight_map(source).values()))


def read_weight_map(source: Source) -> dict[str, str]:
    """Return the file of each tensor.

    Raises:
        BrokenFileError: it is no such index, or names a file that is not beside it.
    """
    weight_map = _weight_map(source)
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BrokenFileError("damaged index of a sharded checkpoint (its weight_map names no files)")
    for name in set(weight_map.values()):
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "://" in name or "\\" in name or "\0" in name:
            raise BrokenFileError(f"index of a sharded checkpoint with a part that is not beside it: {name[:80]!r}")
    # one name for one file: "./part" is no other than "part"
    return {tensor: str(PurePosixPath(name)) for tensor, name in weight_map.items()}


def _weight_map(source: Source) -> Any:
    if source.size_bytes > _LARGEST_BYTES:
        raise BrokenFileError(f"index of a sharded checkpoint of {source.size_bytes} bytes")
    try:
        return json.loads(read_exactly(source, source.size_bytes, 0).decode("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BrokenFileError("damaged index of a sharded checkpoint (no JSON with a weight_map)") from None
