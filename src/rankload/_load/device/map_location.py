"""Apply each form of ``map_location`` to a storage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.serialization import default_restore_location

from rankload.errors import ArgumentError

#: Move a storage from the CPU to its device. The second argument is the location tag from the file.
Restore = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]

_where_it_was: Restore = default_restore_location


def goes_by_tags(map_location: Any) -> bool:
    """Return whether the location tag alone decides where a storage goes, rather than a function of the caller."""
    return map_location is None or isinstance(map_location, (str, torch.device, dict))


def location_of(map_location: Any, tag: str) -> str:
    """Return the location that a ``map_location`` that `goes_by_tags` gives to a tag."""
    if isinstance(map_location, dict):
        return str(map_location.get(tag, tag))
    return tag if map_location is None else str(map_location)


def location_of_script(map_location: Any, tags: Collection[str]) -> Any:
    """Return a ``map_location`` for torch.jit.load, which accepts no dict and moves all tensors to one device.

    Args:
        map_location: any form that torch.load takes.
        tags: location tags of all storages in the archive.

    Raises:
        ArgumentError: the tensors would go to different devices.
    """
    if not isinstance(map_location, dict):
        return map_location
    places = {tag: location_of(map_location, tag) for tag in tags}
    if all(place == tag for tag, place in places.items()):
        return None
    if len({*places.values()}) > 1:
        moves = ", ".join(f"{tag} to {place}" for tag, place in sorted(places.items()))
        raise ArgumentError(
            f"this TorchScript archive has tensors on several devices ({moves}), but torch.jit.load moves all to one: "
            'pass that device, such as map_location="{device}"'
        )
    return next(iter(places.values()))


def restore_of(map_location: Any) -> Restore:
    """Return the function that places a storage as torch.load does (torch/serialization.py, _get_restore_location)."""
    if goes_by_tags(map_location):
        where = functools.cache(lambda tag: location_of(map_location, tag))
        return lambda storage, tag: _where_it_was(storage, where(tag))
    return lambda storage, tag: (
        _where_it_was(storage, tag) if (placed := map_location(storage, tag)) is None else placed
    )
