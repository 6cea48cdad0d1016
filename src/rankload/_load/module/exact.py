"""Decide whether nested content is exactly what torch.load would return."""

from __future__ import annotations

from typing import Any

from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.pickle_values import GlobalName, Unbuilt
from rankload._load.module.lazy_tensor import LazyTensor
from rankload._load.values.torch_values import nested


def is_exact(content: Any) -> bool:
    """Return whether nested content is what torch.load returns, apart from stand-ins for plain tensors."""
    return not any(
        isinstance(value, (Unbuilt, GlobalName, StorageEntry, TensorEntry))
        or (isinstance(value, LazyTensor) and not value.is_plain)
        for value in nested(content)
    )
