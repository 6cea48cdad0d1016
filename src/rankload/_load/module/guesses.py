"""Which ranks hold the same part of a tensor: those along the dimensions of a mesh over which it is replicated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rankload._load.module.slots import is_distributed, is_replicated
from rankload._load.sharing.proposal import Sharers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Guesses:
    """Guesses which ranks hold the same part of a tensor as this rank.

    A mesh says over which of its dimensions a DTensor is replicated. If it is a slice of a larger mesh, the tensor may
    be replicated over the other dimensions, too: in data parallelism it is, in pipeline parallelism it is not. So the
    ranks have to compare what they want.

    Args:
        everyone: ranks that may all hold the same whole tensors.
    """

    def __init__(self, everyone: ProcessGroup) -> None:
        self._everyone = Sharers.of(everyone)
        self._known: dict[Any, tuple[Sharers, ...]] = {}

    def of(self, tensor: torch.Tensor) -> tuple[Sharers, ...]:
        """Return several guesses, each within the one before; none if only this rank can hold the part.

        Pipelines usually are the outermost dimension: the guesses leave out one dimension after the other from there.

        Args:
            tensor: parameter or buffer of a module.
        """
        distributed: Any = tensor
        layout = None
        if is_distributed(tensor):
            layout = distributed.device_mesh, tuple(distributed.placements)
        if layout not in self._known:
            guesses = [self._everyone] if is_replicated(tensor) else []
            if layout is not None:
                guesses += _along_mesh(*layout)
            self._known[layout] = tuple(_nested(guesses))
        return self._known[layout]


def _nested(guesses: Sequence[Sharers]) -> Iterator[Sharers]:
    """Leave out guesses that are not within the one before, and those of this rank alone.

    When a guess turns out wrong, it does so on all its ranks. So they go on to the next one together, if it is within.
    """
    last: set[int] | None = None
    for guess in guesses:
        ranks = set(guess.ranks)
        if len(ranks) > 1 and (last is None or ranks < last):
            yield guess
            last = ranks


def _along_mesh(mesh: Any, placements: Sequence[Any]) -> Iterator[Sharers]:
    replicated = [dimension for dimension, placement in enumerate(placements) if placement.is_replicate()]
    # torch 2.10 and newer (pytorch#164510); with older ones, tensors are shared within their own mesh
    larger = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    if larger is not mesh and larger.get_coordinate() is not None:
        own_ranks = set(mesh.mesh.flatten().tolist())
        own_groups = [_ranks_along(mesh, at) for at in replicated if mesh.size(at) > 1]
        others, same = [], []
        for dimension in range(larger.ndim):
            ranks = _ranks_along(larger, dimension)
            if len(own_ranks.intersection(ranks)) == 1:  # whoever moves along it leaves the tensor's mesh
                others.append(dimension)
            elif ranks in own_groups:
                same.append(dimension)
        # a dimension that is several of the larger mesh's, flattened, has a process group of its own: none of that grid
        for number in range(len(others) if len(same) == len(own_groups) else 0):
            yield from _grid(larger, sorted((*others[number:], *same)))
    if mesh.get_coordinate() is not None:
        yield from _grid(mesh, replicated)


def _grid(mesh: Any, dimensions: Sequence[int]) -> Iterator[Sharers]:
    """Yield the ranks along dimensions of a mesh, if the process groups number them in the mesh's order."""
    dimensions = [dimension for dimension in dimensions if mesh.size(dimension) > 1]
    groups = tuple(mesh.get_group(dimension) for dimension in dimensions)
    coordinate = mesh.get_coordinate()
    place = tuple(slice(None) if at in dimensions else coordinate[at] for at in range(mesh.ndim))
    ranks = mesh.mesh[place].flatten().tolist()
    if all(
        dist.get_process_group_ranks(group) == _ranks_along(mesh, at)
        for at, group in zip(dimensions, groups, strict=True)
    ):
        yield Sharers.of(*groups, ranks=ranks)


def _ranks_along(mesh: Any, dimension: int) -> list[int]:
    """Return the ranks that differ from this one only in one coordinate, in the mesh's order."""
    place = tuple(slice(None) if at == dimension else index for at, index in enumerate(mesh.get_coordinate()))
    return mesh.mesh[place].tolist()  # type: ignore[no-any-return]
