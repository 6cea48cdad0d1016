"""Lightning and Fabric load checkpoints from URLs with rankload.

::

    from lightning.fabric import Fabric
    from rankload.integrations.lightning import RankloadIO

    fabric = Fabric(plugins=[RankloadIO()])
    fabric.load("https://host/last.ckpt", {"model": model})
"""

from __future__ import annotations

from typing import Any

from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from rankload._api.local import load as load_local
from rankload._api.state_dict import dist_load_state_dict_from_url
from rankload._urls import local_path_of


class RankloadIO(TorchCheckpointIO):
    """A checkpoint plugin. It loads URLs by `rankload.dist_load_state_dict_from_url`, and saves as Lightning does.

    Loading is collective, as Lightning's strategies load on every rank: one outcome on all. Local paths are loaded by
    `rankload.load`.

    Args:
        **options: arguments of the call for all URLs, such as ``model_dir``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load a checkpoint. Collective for URLs."""
        is_safe = weights_only is not False
        if local_path_of(str(path)) is not None:
            return load_local(path, map_location, weights_only=is_safe)
        return dist_load_state_dict_from_url(
            str(path), map_location=map_location, **{"weights_only": is_safe, **self._options}
        )
