"""mmengine's CheckpointLoader loads URLs with rankload: call ``register()`` once, before the runner starts."""

from __future__ import annotations

from typing import Any

from mmengine.runner.checkpoint import CheckpointLoader

from rankload._api.state_dict import dist_load_state_dict_from_url

_PREFIXES = ("http://", "https://")


def register(**options: Any) -> None:
    """Let mmengine load checkpoints at URLs by `rankload.dist_load_state_dict_from_url`.

    mmengine's runner loads on every rank, so that the collective call fits: one outcome on all ranks. In code that
    loads on rank 0 alone, use `rankload.patch` instead.

    Args:
        **options: arguments of the call for all URLs, such as ``model_dir``. ``weights_only`` is False unless it is
            given, as in mmengine.
    """

    def load(filename: str, map_location: Any = None) -> Any:
        return dist_load_state_dict_from_url(filename, map_location=map_location, **{"weights_only": False, **options})

    CheckpointLoader.register_scheme(_PREFIXES, loader=load, force=True)
