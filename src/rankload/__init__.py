"""A checkpoint from a URL into every rank of a distributed PyTorch job.

Downloaded once, verified, loaded lean, failing together instead of hanging::

    from rankload import dist_load_state_dict_from_url

    state_dict = dist_load_state_dict_from_url("https://host/resnet50-0676ba61.pth", check_hash=True)

Public names are imported when they are first used: ``import rankload`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankload._version import __version__

if TYPE_CHECKING:
    from rankload import adapt, hub, model_zoo
    from rankload._api import dist_fetch, dist_load_state_dict_from_url
    from rankload._checkpoint.entry import TensorEntry
    from rankload._deliver.checkpoint import Checkpoint
    from rankload._deliver.report import LoadReport
    from rankload._errors import (
        ArgumentError,
        ArgumentMismatchError,
        ArrivalTimeoutError,
        CacheError,
        CallCancelledError,
        ContentChangedError,
        CoordinationError,
        DeviceError,
        DigestMismatchError,
        FetchError,
        FetchTimeoutError,
        HTTPStatusError,
        LoadError,
        MissingFileError,
        NetworkError,
        NotACheckpointError,
        OfflineError,
        ProgressTimeoutError,
        RankFailedError,
        RankloadError,
        RankLostError,
        StoreLostError,
        TruncatedError,
        UnsafePickleError,
        VerificationError,
    )
    from rankload._load import load
    from rankload._load_into import dist_load_into
    from rankload._open_checkpoint import open_checkpoint

__all__ = [
    "ArgumentError",
    "ArgumentMismatchError",
    "ArrivalTimeoutError",
    "CacheError",
    "CallCancelledError",
    "Checkpoint",
    "ContentChangedError",
    "CoordinationError",
    "DeviceError",
    "DigestMismatchError",
    "FetchError",
    "FetchTimeoutError",
    "HTTPStatusError",
    "LoadError",
    "LoadReport",
    "MissingFileError",
    "NetworkError",
    "NotACheckpointError",
    "OfflineError",
    "ProgressTimeoutError",
    "RankFailedError",
    "RankLostError",
    "RankloadError",
    "StoreLostError",
    "TensorEntry",
    "TruncatedError",
    "UnsafePickleError",
    "VerificationError",
    "__version__",
    "adapt",
    "dist_fetch",
    "dist_load_into",
    "dist_load_state_dict_from_url",
    "hub",
    "load",
    "model_zoo",
    "open_checkpoint",
]

_HOMES = {
    "dist_fetch": "_api",
    "dist_load_state_dict_from_url": "_api",
    "dist_load_into": "_load_into",
    "load": "_load",
    "open_checkpoint": "_open_checkpoint",
    "Checkpoint": "_deliver.checkpoint",
    "LoadReport": "_deliver.report",
    "TensorEntry": "_checkpoint.entry",
}
_MODULES = frozenset({"adapt", "hub", "model_zoo"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rankload.{name}")
    if name in __all__:
        value = getattr(importlib.import_module(f"rankload.{_HOMES.get(name, '_errors')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rankload' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
