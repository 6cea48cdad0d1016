"""With whom a rank may share a tensor, on meshes of many ranks: this process is one of them, with no other there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from rankload._load.module.guesses import Guesses

WORLD, RANK = 16, 5
ALL = tuple(range(WORLD))


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()


def guesses_for(mesh: DeviceMesh, *placements: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ranks, and sizes of the process groups."""
    assert dist.group.WORLD is not None
    tensor = DTensor.from_local(torch.ones(4, 4), mesh, placements, run_check=False)
    return [(guess.ranks, guess.sizes) for guess in Guesses(dist.group.WORLD).of(tensor)]


def test_plain_tensors() -> None:
    assert dist.group.WORLD is not None
    (guess,) = Guesses(dist.group.WORLD).of(torch.ones(3))
    assert (guess.ranks, guess.sizes) == (ALL, (WORLD,))


def test_replicas_on_the_mesh_of_the_tensor() -> None:
    mesh = init_device_mesh("cpu", (2, 8), mesh_dim_names=("replicate", "shard"))
    assert guesses_for(mesh, Replicate(), Shard(0)) == [((5, 13), (2,))]
    assert guesses_for(mesh, Shard(0), Shard(1)) == []
    assert guesses_for(mesh, Shard(1), Replicate()) == [(tuple(range(8)), (8,))]
    assert guesses_for(mesh, Replicate(), Replicate()) == [(ALL, (WORLD,))]
    cube = init_device_mesh("cpu", (2, 2, 4))
    assert guesses_for(cube, Replicate(), Shard(0), Replicate()) == [((4, 5, 6, 7, 12, 13, 14, 15), (2, 4))]


def test_replicas_that_only_a_larger_mesh_tells_of() -> None:
    mesh = init_device_mesh("cpu", (2, 2, 4), mesh_dim_names=("pp", "dp", "tp"))
    assert guesses_for(mesh["tp"], Shard(0)) == [((1, 5, 9, 13), (2, 2)), ((1, 5), (2,))]
    first_stage, own_replica = tuple(range(8)), (4, 5, 6, 7)
    assert guesses_for(mesh["tp"], Replicate()) == [(ALL, (WORLD,)), (first_stage, (2, 4)), (own_replica, (4,))]
    assert guesses_for(mesh["dp", "tp"], Replicate(), Shard(0)) == [((1, 5, 9, 13), (2, 2)), ((1, 5), (2,))]
    flat = mesh["dp", "tp"]._flatten("all")
    assert guesses_for(flat, Replicate()) == [(ALL, (WORLD,)), (first_stage, (8,))]
    assert guesses_for(flat, Shard(0)) == [((5, 13), (2,))]


def test_a_mesh_whose_process_groups_count_differently_is_not_trusted() -> None:
    order = [[3, 5], [1, 7]]  # process groups sort their ranks: 3 would be the second one along the first dimension
    assert guesses_for(DeviceMesh("cpu", order), Replicate(), Shard(0)) == [((5, 7), (2,))]
    assert guesses_for(DeviceMesh("cpu", [[7, 1], [5, 3]]), Replicate(), Shard(0)) == []


def test_a_mesh_without_this_rank() -> None:
    assert guesses_for(DeviceMesh("cpu", [[0, 1], [2, 3]]), Replicate(), Shard(0)) == []
