"""Load a checkpoint from a URL into every rank of a distributed PyTorch job.

The checkpoint is downloaded once, verified, and loaded with little memory. Ranks fail together instead of hanging::

    from rankload import dist_load_state_dict_from_url

    state_dict = dist_load_state_dict_from_url("https://host/resnet50-0676ba61.pth", check_hash=True)

Public names are imported on first use: ``import rankload`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankload._version import __version__

if TYPE_CHECKING:
    from rankload import adapt, errors, hub, model_zoo
    from rankload._api.fetch import dist_fetch
    from rankload._api.inspect import open_checkpoint
    from rankload._api.local import load
    from rankload._api.module import dist_load_into
    from rankload._api.once import dist_once, local_once
    from rankload._api.pretrained import load_pretrained
    from rankload._api.snapshot import dist_snapshot
    from rankload._api.state_dict import dist_load_state_dict_from_url
    from rankload._formats.entry import TensorEntry
    from rankload._load.checkpoint import Checkpoint
    from rankload._load.report import LoadReport
    from rankload._patch.patch import patch, unpatch
    from rankload._patch.patched_load import dist_hub_load
    from rankload.errors import (
        ArgumentError,
        CacheError,
        CoordinationError,
        FetchError,
        LoadError,
        RankloadError,
        VerificationError,
    )

__all__ = [
    "ArgumentError",
    "CacheError",
    "Checkpoint",
    "CoordinationError",
    "FetchError",
    "LoadError",
    "LoadReport",
    "RankloadError",
    "TensorEntry",
    "VerificationError",
    "__version__",
    "adapt",
    "dist_fetch",
    "dist_hub_load",
    "dist_load_into",
    "dist_load_state_dict_from_url",
    "dist_once",
    "dist_snapshot",
    "errors",
    "hub",
    "load",
    "load_pretrained",
    "local_once",
    "model_zoo",
    "open_checkpoint",
    "patch",
    "unpatch",
]

_HOMES = {
    "dist_fetch": "_api.fetch",
    "dist_load_state_dict_from_url": "_api.state_dict",
    "dist_load_into": "_api.module",
    "dist_hub_load": "_patch.patched_load",
    "dist_once": "_api.once",
    "dist_snapshot": "_api.snapshot",
    "local_once": "_api.once",
    "load": "_api.local",
    "load_pretrained": "_api.pretrained",
    "open_checkpoint": "_api.inspect",
    "patch": "_patch.patch",
    "unpatch": "_patch.patch",
    "Checkpoint": "_load.checkpoint",
    "LoadReport": "_load.report",
    "TensorEntry": "_formats.entry",
}
_MODULES = frozenset({"adapt", "errors", "hub", "model_zoo"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rankload.{name}")
    if name in __all__:
        value = getattr(importlib.import_module(f"rankload.{_HOMES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rankload' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
