"""`load`: torch.load for one rank's own use, with a map_location that is right for the rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from rankload._cache.layout import local_path_of, redact
from rankload._deliver.failures import translated
from rankload._deliver.read import read_checkpoint
from rankload._errors import ArgumentError
from rankload._job.devices import resolve_map_location
from rankload._job.environment import identity_from_environment

if TYPE_CHECKING:
    from rankload._api import MapLocation


def load(
    f: str | os.PathLike[str] | IO[bytes],
    map_location: MapLocation = None,
    *,
    weights_only: bool | None = True,
    mmap: bool | None = None,
    **torch_load_arguments: Any,
) -> Any:
    """Load a local checkpoint in this process, as torch.load does. Not collective, and no other rank is waited for.

    What differs from torch.load: ``map_location=None`` and its templates are those of `dist_load_state_dict_from_url`,
    files are mapped wherever their format allows it, safetensors files are loaded, whatever their name, and what goes
    wrong is an error that names the file.

    Args:
        f: a path, a file URL, or an open binary file, such as a ``BytesIO``, that can seek.
        map_location: any form that torch.load takes.
        weights_only: refuse whatever is not tensors and plain containers.
        mmap: map the file; default: wherever its format allows. Not for open files.
        **torch_load_arguments: torch.load's others: ``pickle_module``, ``encoding``, …

    Raises:
        UnsafePickleError: ``weights_only`` refused the file.
        MissingFileError: there is no such file: a FileNotFoundError.
        LoadError: it could not be loaded for another reason.
        ArgumentError: it is at a URL: see `dist_load_state_dict_from_url`.
    """
    target = resolve_map_location(map_location, identity_from_environment())
    if isinstance(f, (str, os.PathLike)):
        path = local_path_of(os.fspath(f))
        if path is None:
            shown = redact(os.fspath(f))
            raise ArgumentError(f"load({shown!r}): not a local file; dist_load_state_dict_from_url loads from URLs")
        return read_checkpoint(path, target, weights_only=weights_only, mmap=mmap, **torch_load_arguments)
    if mmap:
        raise ArgumentError("load(…, mmap=True): an open file cannot be mapped; give its path")
    with translated(Path(str(getattr(f, "name", "an open file")))):
        return torch.load(f, target, weights_only=weights_only, **torch_load_arguments)
