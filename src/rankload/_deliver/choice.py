"""Which delivery suits a load where the caller leaves it open. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rankload._errors import ArgumentError

#: Backends that gain nothing by it, or may not have the collective.
_THROUGH_THE_HOST = frozenset({"gloo", "mpi", "ucc"})


ON_THE_CPU = "the tensors are on the CPU, where the ranks of a node share the file's pages"


@dataclass(frozen=True)
class Facts:
    """What one rank knows before the ranks meet.

    Attributes:
        device_type: where most of its tensors are to be: ``"cpu"``, ``"cuda"``, …
        backend: of the process group for that device; None where there is no process group, or none for it.
        shared_bytes: of whole tensors on that device, which other ranks may want too.
        own_bytes: of parts that are this rank's alone, and of what goes elsewhere.
        is_one_node: whether all ranks are on one; False where nobody tells.
        is_on_local_disk: whether the file is on a disk of this node, or in its memory.
    """

    device_type: str
    backend: str | None
    shared_bytes: int
    own_bytes: int
    is_one_node: bool
    is_on_local_disk: bool


@dataclass(frozen=True)
class Choice:
    """A delivery, and why."""

    delivery: Literal["read", "gather"]
    reason: str


def choose(facts: Facts) -> Choice:
    """Choose between reading on each rank, and sharing out the reading between them."""
    device, backend = facts.device_type, facts.backend
    if device == "cpu":
        return Choice("read", ON_THE_CPU)
    if backend is None:
        return Choice("read", f"there is no process group with a backend for {device}")
    if backend in _THROUGH_THE_HOST:
        return Choice("read", f"{backend} takes {device} tensors through the host's memory")
    if not facts.shared_bytes:
        return Choice("read", f"no tensor goes whole to {device} that could be shared out by its place in the file")
    if facts.own_bytes > facts.shared_bytes:
        return Choice("read", f"most of what goes to this rank's {device} device is its own part of it")
    if not facts.is_one_node and facts.is_on_local_disk:
        return Choice("read", "the file is on a disk of this node, and the ranks are not known to be on one")
    place = "one node" if facts.is_one_node else "nodes that read over the network"
    return Choice("gather", f"the same tensors go to {device} devices of {place}, with {backend}")


def asked_for(facts: Facts) -> Choice:
    """Check that a gather is possible.

    Raises:
        ArgumentError: it is not.
    """
    if facts.backend is None:
        raise ArgumentError(
            "delivery='gather': there is no process group with a backend for the module's device "
            f"{facts.device_type!r}: call init_process_group before, with one (backend='nccl' or 'cpu:gloo,cuda:nccl' "
            "for cuda), or pass delivery='auto'"
        )
    return Choice("gather", "it was asked for")
