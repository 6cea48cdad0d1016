"""The ways to get one checkpoint into every rank, each as a function that a rank runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from harness.rank import mark_and_wait


@dataclass(frozen=True)
class Way:
    """One way, and what a rank does for it."""

    name: str
    load: Callable[[int, str, str], Any]


def timed(rank: int, load: Callable[[int, str, str], Any], url: str, model_dir: str) -> float:
    """Run one way in a rank that has imported everything; return the seconds of the load call."""
    import rankload._api.state_dict
    import rankload._load.state_dict.read_checkpoint  # noqa: F401 - the import is not part of the call

    if load is torch_hub_on_rank_0_then_barrier:
        torch.distributed.init_process_group("gloo")
    mark_and_wait("ready")
    started = time.perf_counter()
    state_dict = load(rank, url, model_dir)
    seconds = time.perf_counter() - started
    for tensor in state_dict.values():
        tensor.view(torch.uint8).view(-1)[::512].sum()
    mark_and_wait("touched")
    return seconds


def rankload_in_every_rank(rank: int, url: str, model_dir: str) -> Any:
    """Ours: verified."""
    from rankload import dist_load_state_dict_from_url

    return dist_load_state_dict_from_url(url, model_dir, check_hash=True)


def torch_hub_in_every_rank(rank: int, url: str, model_dir: str) -> Any:
    """What most scripts do."""
    return torch.hub.load_state_dict_from_url(url, model_dir, progress=False, check_hash=True, weights_only=True)


def torch_hub_on_rank_0_then_barrier(rank: int, url: str, model_dir: str) -> Any:
    """What careful scripts do."""
    if rank == 0:
        state_dict = torch_hub_in_every_rank(rank, url, model_dir)
    torch.distributed.barrier()
    return state_dict if rank == 0 else torch_hub_in_every_rank(rank, url, model_dir)


WAYS = [
    Way("rankload", rankload_in_every_rank),
    Way("torch.hub on rank 0, barrier", torch_hub_on_rank_0_then_barrier),
    Way("torch.hub in every rank", torch_hub_in_every_rank),
]
