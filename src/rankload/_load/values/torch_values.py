"""Build torch's own plain values (Size, device, dtype) from an index."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from rankload._formats.entry import MAX_DIMENSIONS
from rankload._formats.pickle_values import GlobalName, Unbuilt


def built(value: Any) -> Any:
    """Return torch's own value (Size, device, dtype) for its note in an index; return other values unchanged."""
    with suppress(TypeError, ValueError, RuntimeError):
        match value:
            # a list may have got more items since
            case Unbuilt(GlobalName("torch", "Size"), (tuple(sizes),), None, []) if len(sizes) <= MAX_DIMENSIONS:
                return torch.Size(sizes)
            case Unbuilt(GlobalName("torch", "device"), arguments, None, []):
                return torch.device(*arguments)
            case GlobalName("torch", name) if isinstance(dtype := vars(torch).get(name), torch.dtype):
                return dtype
    return value
