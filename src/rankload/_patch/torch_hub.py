"""What takes the place of torch.hub's functions."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.hub

from rankload._api import hub_load
from rankload._api.once_per_job import once_per_job
from rankload._api.state_dict import load_in_this_process
from rankload._api.tracebacks import short_tracebacks
from rankload._fetch.request import torch_hub_directory
from rankload._fetch.to_path import download_to
from rankload._urls import expanded, url_key

if TYPE_CHECKING:
    from rankload._api.state_dict import MapLocation

_logger = logging.getLogger("rankload")

#: Parameters of torch.hub's functions in the versions that are known. A function with others is left alone.
_KNOWN_PARAMETERS = {
    "load_state_dict_from_url": "url model_dir map_location progress check_hash file_name weights_only",
    "download_url_to_file": "url dst hash_prefix progress",
    "load": "repo_or_dir model args source trust_repo force_reload verbose skip_validation kwargs",
    "list": "github force_reload skip_validation trust_repo verbose",
    "help": "github model force_reload skip_validation trust_repo",
}


@short_tracebacks
@functools.wraps(torch.hub.load_state_dict_from_url)
def load_state_dict_from_url(
    url: str,
    model_dir: str | None = None,
    map_location: MapLocation = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
    weights_only: bool = False,
) -> Any:
    """Load as torch.hub's function does, once per job; ``map_location=None`` has torch's meaning."""
    return load_in_this_process(
        url,
        model_dir if model_dir is not None else torch_hub_directory(),
        map_location,
        progress=progress,
        check_hash=check_hash,
        file_name=file_name,
        weights_only=weights_only,
        keeps_devices=True,
    )


@short_tracebacks
@functools.wraps(torch.hub.download_url_to_file)
def download_url_to_file(url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
    """Download as torch.hub's function does, once per job."""
    path = expanded(Path(dst)).absolute()
    once_per_job(
        lambda: download_to(url, path, hash_prefix, progress=progress),
        key=f"download {url_key(url)} to {path} {hash_prefix or ''}",
        directory=path.parent,
        is_usable=lambda _: path.exists(),  # scripts unpack archives, and remove them
        has_lease=False,
    )


_REPLACEMENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "load_state_dict_from_url": (torch.hub.load_state_dict_from_url, load_state_dict_from_url),
    "download_url_to_file": (torch.hub.download_url_to_file, download_url_to_file),
    "load": (torch.hub.load, hub_load.load),
    "list": (torch.hub.list, hub_load.list_entry_points),
    "help": (torch.hub.help, hub_load.entry_point_help),
}


def replacements() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Yield name, original and replacement of the functions of torch.hub that are known."""
    for name, (original, replacement) in _REPLACEMENTS.items():
        found = " ".join(inspect.signature(original).parameters)
        if found == _KNOWN_PARAMETERS[name]:
            yield name, original, replacement
        else:
            _logger.warning(
                "torch.hub.%s of torch %s is left alone: its parameters (%s) are not those that rankload knows (%s)",
                name, torch.__version__, found, _KNOWN_PARAMETERS[name],
            )  # fmt: skip
