"""Decide whether nested content is exactly what torch.load would return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.pickle_values import GlobalName, Unbuilt
from rankload._load.module.lazy_tensor import LazyTensor


def is_exact(content: Any) -> bool:
    """Return whether nested content is what torch.load returns, apart from lazy tensors for plain tensors."""
    rest, seen = [content], set[int]()
    while rest:
        value = rest.pop()
        if isinstance(value, (Unbuilt, GlobalName, StorageEntry, TensorEntry)):
            return False
        if isinstance(value, LazyTensor) and not value.is_plain:
            return False
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, Mapping) else value)
    return True
