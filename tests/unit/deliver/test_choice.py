"""What ``delivery="auto"`` chooses, and what it says of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rankload._deliver.choice import Choice, Facts, asked_for, choose
from rankload._errors import ArgumentError

REPLICATED = Facts("cuda", "nccl", shared_bytes=1000, own_bytes=0, is_one_node=True, is_on_local_disk=True)


@pytest.mark.parametrize(
    ("changes", "delivery", "reason"),
    [
        ({}, "gather", "the same tensors go to cuda devices of one node, with nccl"),
        ({"device_type": "cpu"}, "read", "on the CPU"),
        ({"device_type": "cpu", "backend": "gloo"}, "read", "on the CPU"),
        ({"backend": None}, "read", "no process group with a backend for cuda"),
        ({"backend": "gloo"}, "read", "gloo takes cuda tensors through the host's memory"),
        ({"device_type": "xpu", "backend": "xccl"}, "gather", "xccl"),
        ({"own_bytes": 1001}, "read", "its own part"),
        ({"own_bytes": 1000}, "gather", "the same tensors"),
        ({"shared_bytes": 0, "own_bytes": 1}, "read", "no tensor"),
        ({"shared_bytes": 0}, "read", "no tensor"),
        ({"backend": "mpi"}, "read", "mpi takes cuda tensors through the host's memory"),
        ({"is_one_node": False}, "read", "a disk of this node"),
        ({"is_one_node": False, "is_on_local_disk": False}, "gather", "nodes that read over the network"),
        ({"is_on_local_disk": False}, "gather", "one node"),
    ],
)
def test_choice(changes: dict[str, Any], delivery: str, reason: str) -> None:
    choice = choose(replace(REPLICATED, **changes))
    assert choice.delivery == delivery and reason in choice.reason


def test_who_asks_for_a_gather_gets_it() -> None:
    assert asked_for(replace(REPLICATED, device_type="cpu", backend="gloo")) == Choice("gather", "it was asked for")


def test_who_asks_for_what_is_impossible_is_told_what_it_takes() -> None:
    with pytest.raises(ArgumentError, match=r"no process group with a backend for the module's device 'cuda'.*nccl"):
        asked_for(replace(REPLICATED, backend=None))
