"""The ways from a new process to a state dict. A rank gets them before it has imported anything of rankload."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.hub

from harness.rank import mark_and_wait


def timed(rank: int, load: Callable[[str, str], Any], url: str, directory: str) -> float:
    """Return the seconds of a rank's first call, its imports beyond torch's included."""
    mark_and_wait("ready")
    started = time.perf_counter()
    load(url, directory)
    return time.perf_counter() - started


def rankload(url: str, directory: str) -> Any:
    """Import and call."""
    from rankload import dist_load_state_dict_from_url

    return dist_load_state_dict_from_url(url, directory)


def rankload_imports(url: str, directory: str) -> None:
    """Import what a warm call needs, and call nothing."""
    import rankload._api.state_dict
    import rankload._load.node.node_copy
    import rankload._load.state_dict.read_checkpoint  # noqa: F401


def mapped(url: str, directory: str) -> Any:
    """Let torch map the cached file."""
    return torch.load(f"{directory}/{url.rpartition('/')[2]}", mmap=True, weights_only=True)


def hub(url: str, directory: str) -> Any:
    """Let torch.hub read the cached file."""
    return torch.hub.load_state_dict_from_url(url, directory, progress=False, weights_only=True)


WAYS = {
    "rankload: import and first call": rankload,
    "rankload: imports alone": rankload_imports,
    "torch.load(mmap=True)": mapped,
    "torch.hub.load_state_dict_from_url": hub,
}
