"""Which rank of a node speaks while several wait."""

from __future__ import annotations

import pytest

from rankload._coordination.polling import (
    LARGE_JOB_LOOK_SECONDS,
    is_on_own_node,
    is_voice_of_node,
    look_interval_seconds,
)
from rankload._types import Identity


def identity(rank: int, job_size: int | None = 8) -> Identity:
    """A rank of two nodes with four ranks each."""
    return Identity(rank, 8, rank % 4, 4, rank // 4, "host", "torchrun", job_size)


@pytest.mark.parametrize(
    ("awaited", "voices"),
    [([0], [1, 4]), ([4], [0, 5]), ([0, 1], [2, 4]), (range(1, 8), [0]), ([6], [0, 4])],
)
def test_the_first_rank_of_a_node_that_is_not_waited_for_speaks(awaited, voices):
    assert [rank for rank in range(8) if rank not in awaited and is_voice_of_node(identity(rank), awaited)] == voices


def test_ranks_of_a_subgroup_and_of_an_unknown_place_speak_each_for_themselves():
    assert is_voice_of_node(identity(3, job_size=16), [0])
    assert is_voice_of_node(Identity(3, 8, None, None, None, "host", "mpi"), [0])


def test_only_ranks_of_the_own_node_are_known_to_be_there():
    assert [rank for rank in range(8) if is_on_own_node(identity(5), rank)] == [4, 5, 6, 7]
    assert not is_on_own_node(identity(5, job_size=16), 4)
    assert not is_on_own_node(Identity(3, 8, None, None, None, "host", "mpi"), 2)


@pytest.mark.parametrize(
    ("world_size", "seconds"),
    [(2, 0.05), (64, 0.256), (250, 1.0), (100_000, LARGE_JOB_LOOK_SECONDS)],
)
def test_ranks_of_a_large_job_look_less_often_but_hear_of_a_failure_in_time(world_size, seconds):
    assert look_interval_seconds(world_size, 0.05) == seconds
