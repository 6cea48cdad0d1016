"""Build torch's own plain values (Size, device, dtype) from an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from rankload._formats.entry import MAX_DIMENSIONS, StorageEntry, TensorEntry
from rankload._formats.pickle_values import GlobalName, Unbuilt


def built(value: Any) -> Any:
    """Return one of torch's own values for a note of it in an index; anything else as it is."""
    with suppress(TypeError, ValueError, RuntimeError):
        match value:
            case Unbuilt(GlobalName("torch", "Size"), (sizes,), None, []) if len(sizes) <= MAX_DIMENSIONS:
                return torch.Size(sizes)
            case Unbuilt(GlobalName("torch", "device"), arguments, None, []):
                return torch.device(*arguments)
            case GlobalName("torch", name) if isinstance(dtype := vars(torch).get(name), torch.dtype):
                return dtype
    return value


def has_plain_tensors_only(content: Any) -> bool:
    """Return whether the content of an index has plain tensors and plain values: nothing that looks at elements."""
    return not any(
        isinstance(value, StorageEntry)
        or (isinstance(value, TensorEntry) and not value.is_plain)
        or (isinstance(value, (Unbuilt, GlobalName)) and built(value) is value)
        for value in nested(content)
    )


def nested(content: Any) -> Iterator[Any]:
    """Yield nested content, and all that it holds, once each."""
    rest, seen = [content], set[int]()
    while rest:
        value = rest.pop()
        yield value
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, Mapping) else value)
