"""Which processes belong to one job, and which of their calls belong together."""

from __future__ import annotations

import time

import pytest

from rankload._coordination.job import Turn, next_turn
from rankload._fetch.run_once import _Run

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "7"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


def turn_of(key: str, environ: dict[str, str]) -> Turn:
    turn = next_turn(key, environ)
    assert turn is not None
    return turn


@pytest.mark.parametrize("environ", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
def test_ranks_of_one_job(environ: dict[str, str]) -> None:
    name = next(iter(environ))
    assert turn_of("a", environ).job == turn_of("b", {**environ, name: "3"}).job


@pytest.mark.parametrize(
    ("environ", "change"),
    [
        (TORCHRUN, {"TORCHELASTIC_RUN_ID": "8"}),
        (TORCHRUN, {"MASTER_PORT": "29501"}),
        (TORCHRUN, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (SLURM, {"SLURM_JOB_ID": "8"}),
        (SLURM, {"SLURM_STEP_ID": "1"}),
        (SLURM, {"SLURM_RESTART_COUNT": "1"}),
    ],
)
def test_another_job_or_another_start_of_it(environ: dict[str, str], change: dict[str, str]) -> None:
    assert turn_of("c", environ).job != turn_of("d", {**environ, **change}).job


def test_calls_are_counted_by_their_key() -> None:
    assert [turn_of(key, TORCHRUN).number for key in ("one", "one", "other", "one")] == [1, 2, 1, 3]


@pytest.mark.parametrize(
    "environ",
    [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "3"}],
    ids=["no launcher", "one rank", "an unknown job", "contradiction"],
)
def test_process_that_shares_nothing(environ: dict[str, str]) -> None:
    assert next_turn("e", environ) is None


def test_launch_was_before_now_and_after_the_boot() -> None:
    launched_at = turn_of("f", TORCHRUN).launched_at
    assert time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - 1 < launched_at < time.time()


@pytest.mark.parametrize(
    ("job", "number", "ended_at", "covers"),
    [
        ("mine", 2, 1000.0, True),
        ("mine", 3, 1000.0, True),  # a rank that calls more often
        ("mine", 1, 1000.0, False),
        ("other", 2, 1000.0, False),
        (None, 0, 1000.0, False),
        ("mine", 2, 994.0, False),  # of an earlier job at the same address
        ("mine", 2, 996.0, True),  # clocks differ
    ],
)
def test_which_run_is_of_a_turn(job: str | None, number: int, ended_at: float, covers: bool) -> None:
    run = _Run("id", {"kind": "json", "value": 1}, job, number, ended_at)
    assert run.covers(Turn("mine", 2, launched_at=1000.0)) is covers
