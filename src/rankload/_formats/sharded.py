"""Hugging Face's index of a checkpoint in several files: ``model.safetensors.index.json``.

JSON: ``{"metadata": {...}, "weight_map": {tensor name: file name}}`` (huggingface_hub, "split_torch_state_dict").
"""

from __future__ import annotations

import json
import re
from typing import Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.source import Source, read_exactly

_HEAD_BYTES = 64

#: Largest index. The index of a million tensors has about 100 MB.
_MAX_BYTES = 1 << 28

#: Longest component of a path (NAME_MAX, limits.h).
_MAX_COMPONENT_BYTES = 255

#: Name of a part in a fetched index: one component, no hidden file, no command-line option, and no trailing dot, which
#: some filesystems drop. The length stays well below NAME_MAX: the cache appends its own suffixes.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,199}(?<!\.)")

#: Suffixes of rankload's own files beside a cached file. A part with such a name would take the place of such a file.
_OWN_SUFFIXES = (".partial", ".journal", ".lease", ".tmp")


def is_plain_name(name: str) -> bool:
    """Return whether a part of a *fetched* index may have this name in the cache.

    The rules are stricter than for an index on this machine. The name must be a single component of at most 200 ASCII
    letters, digits and ``_.+=-``. It must start with a letter, digit or underscore, and must not end with a dot or one
    of rankload's own suffixes. An index from a server must not choose folders, hidden files, or the files with which
    the cache coordinates.
    """
    return _PLAIN_NAME.fullmatch(name) is not None and not name.lower().endswith(_OWN_SUFFIXES)


def claims_to_be_json(head: bytes) -> bool:
    """Return whether a file's first bytes may begin an index. The name does not count: a cached file may have any."""
    return head.lstrip()[:1] == b"{" and b"\0" not in head


def has_weight_map(source: Source) -> bool:
    """Return whether a file is JSON with a ``weight_map``; the map itself may be damaged."""
    if not claims_to_be_json(source.read(_HEAD_BYTES, 0)):
        return False
    try:
        _weight_map(source)
    except BrokenFileError:
        return False
    return True


def part_names(source: Source) -> list[str]:
    """Return the names of an index's parts, sorted.

    Raises:
        BrokenFileError: the file is no index, or names a part that is not beside the index.
    """
    return sorted(set(read_weight_map(source).values()))


def read_weight_map(source: Source) -> dict[str, str]:
    """Return the file name of each tensor.

    Raises:
        BrokenFileError: the file is no index, or names a part that is not beside the index.
    """
    weight_map = _weight_map(source)
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BrokenFileError("damaged index of a sharded checkpoint (its weight_map names no files)")
    for name in set(weight_map.values()):
        if not _is_beside(name):
            raise BrokenFileError(f"index of a sharded checkpoint with a part that is not beside it: {name[:80]!r}")
    return dict(weight_map)


def _is_beside(name: str) -> bool:
    """Return whether a name is the only spelling of a file beside the index, or in a folder beside the index.

    Unicode is allowed, but only characters that a terminal shows unchanged: no control characters, no bidirectional
    overrides, no blank before or after a component.
    """
    if not name.isprintable() or "\\" in name or "://" in name:
        return False
    components = name.split("/")  # an absolute path has an empty first component
    return all(
        component not in ("", ".", "..")
        and component == component.strip()
        and len(component.encode()) <= _MAX_COMPONENT_BYTES
        for component in components
    )


def _weight_map(source: Source) -> Any:
    if source.size_bytes > _MAX_BYTES:
        raise BrokenFileError(f"index of a sharded checkpoint of {source.size_bytes} bytes")
    try:
        return json.loads(read_exactly(source, source.size_bytes, 0).decode("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BrokenFileError("damaged index of a sharded checkpoint (no JSON with a weight_map)") from None
