"""What a ``map_location`` means, for storages that torch.load does not read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.serialization import default_restore_location

from rankload._job.devices import Placement

#: Puts a storage, which is on the CPU, where it belongs; its second argument is the tag with which it was saved.
Restore = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]

_where_it_was: Restore = default_restore_location


def goes_by_tags(map_location: Any) -> bool:
    """Tell whether no storage's content, and no caller's own function, has a say in where a storage goes."""
    return map_location is None or isinstance(map_location, (str, torch.device, dict, Placement))


def location_of(map_location: Any, tag: str) -> str:
    """Return where one that `goes_by_tags` puts what is tagged so."""
    if isinstance(map_location, Placement):
        return str(map_location.device_of(tag) or tag)
    if isinstance(map_location, dict):
        return str(map_location.get(tag, tag))
    return tag if map_location is None else str(map_location)


def restore_of(map_location: Any) -> Restore:
    """Return what torch.load does with each storage (torch/serialization.py, _get_restore_location)."""
    if goes_by_tags(map_location):
        where = functools.cache(lambda tag: location_of(map_location, tag))
        return lambda storage, tag: _where_it_was(storage, where(tag))
    return lambda storage, tag: (
        _where_it_was(storage, tag) if (placed := map_location(storage, tag)) is None else placed
    )
