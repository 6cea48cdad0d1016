"""torch.hub's download surface with rankload's safety: ``import rankload.hub as hub`` is a drop-in.

Signatures, cache directory, file names and error texts are torch.hub's; what is not here is torch.hub's own (``load``,
``list``, ``help``). **Not collective**: any rank may call, alone or
with others, as scripts do under ``if rank == 0:``. Processes that share the cache directory download once, through the
lease between them. What differs: README, "Differences from torch.hub".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.hub
from torch.hub import get_dir, set_dir

from rankload._api.state_dict import load_in_this_process
from rankload._api.tracebacks import short_tracebacks
from rankload._fetch.request import torch_hub_directory
from rankload._fetch.to_path import download_to

if TYPE_CHECKING:
    from rankload._api.state_dict import MapLocation

__all__ = ["download_url_to_file", "get_dir", "load_state_dict_from_url", "set_dir"]


def __getattr__(name: str) -> Any:
    """Give what else torch.hub has: load, list, help, … Its ``load`` and ``list`` download repositories themselves."""
    return getattr(torch.hub, name)


@short_tracebacks
def load_state_dict_from_url(
    url: str,
    model_dir: str | None = None,
    map_location: MapLocation = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Load the serialized object at a URL, as torch.hub.load_state_dict_from_url does. Not collective.

    Args and return value are torch's; ``map_location=None`` never puts a tensor on another rank's device.

    Raises:
        RankloadError: as `rankload.dist_load_state_dict_from_url`; a wrong hash is a RuntimeError in torch's words, a
            failed request a urllib.error.URLError with ``code``.
    """
    return load_in_this_process(  # type: ignore[no-any-return]
        url,
        model_dir if model_dir is not None else torch_hub_directory(),
        map_location,
        progress=progress,
        check_hash=check_hash,
        file_name=file_name,
        weights_only=weights_only,
    )


@short_tracebacks
def download_url_to_file(url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
    """Download a URL to a local path, replacing what is there, as torch.hub.download_url_to_file does. Not collective.

    Args:
        url: http or https URL.
        dst: full path of the file; ``~`` is expanded. It appears complete and verified, or not at all.
        hash_prefix: what the SHA-256 must start with.
        progress: show a bar on stderr, or lines if that is no terminal.

    Raises:
        RankloadError: as above.
    """
    download_to(url, Path(dst), hash_prefix, progress=progress)
