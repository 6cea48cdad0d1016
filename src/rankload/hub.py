"""Drop-in for torch.hub's downloads, with rankload's safety: ``import rankload.hub as hub``.

Signatures, cache directory, file names and error texts are those of torch.hub. **Not collective**: any rank may make a
call, alone or with others, as scripts do under ``if rank == 0:``. Processes that share the cache directory download
once: the lease between them sees to that. What an entry point of ``load`` downloads itself is once per job, too, as
under `rankload.patch`. docs/differences.md lists the differences.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.hub
from torch.hub import get_dir, set_dir

from rankload._api.hub_load import entry_point_help as help
from rankload._api.hub_load import list_entry_points as list
from rankload._api.state_dict import load_in_this_process
from rankload._api.tracebacks import short_tracebacks
from rankload._fetch.request import torch_hub_directory
from rankload._fetch.to_path import download_to
from rankload._patch.patched_load import load

if TYPE_CHECKING:
    from rankload._api.state_dict import MapLocation

__all__ = ["download_url_to_file", "get_dir", "help", "list", "load", "load_state_dict_from_url", "set_dir"]


def __getattr__(name: str) -> Any:
    """Return torch.hub's own attribute, such as a constant."""
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

    Arguments and return value are those of torch.hub's function, but ``map_location=None`` never puts a tensor on
    another rank's device.

    Raises:
        RankloadError: as in `rankload.dist_load_state_dict_from_url`. A wrong hash is a RuntimeError with torch's
            message. A failed request is a urllib.error.URLError; after an error status it has a ``code``.
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
    """Download a URL to a local path and replace any file there, like torch.hub.download_url_to_file. Not collective.

    Args:
        url: http or https URL.
        dst: full path of the file; ``~`` is expanded. The file appears complete and verified, or not at all.
        hash_prefix: first hex digits of the expected SHA-256.
        progress: show a bar on stderr, or lines if stderr is not a terminal.

    Raises:
        RankloadError: as in `load_state_dict_from_url`.
    """
    download_to(url, Path(dst), hash_prefix, progress=progress)
