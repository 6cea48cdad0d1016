"""Small jobs in which a rank is killed, frozen, late, interrupted or unable to load, at a moment drawn at random.

PYTHONPATH=tests:src python -m soak.chaos --runs 300 --seed 1
"""

from __future__ import annotations

import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.checkpoints import digest_of
from harness.origin import Origin, Reply
from harness.ranks import RankFailed, RankGroup, RankResult, run_ranks, start_ranks
from soak.chaos_rank import Ended, Plan, make_calls
from soak.runs import start

NAME = "model.pth"
LIVENESS_SECONDS = 3.0

ENVIRONMENT = {
    "RANKLOAD_LIVENESS_SECONDS": str(LIVENESS_SECONDS),
    "RANKLOAD_HEARTBEAT_SECONDS": "0.2",
    "RANKLOAD_ARRIVAL_SECONDS": "10",
    "RANKLOAD_CONNECT_SECONDS": "5",
    "RANKLOAD_LEASE_SECONDS": "2",
}

#: No rank waits longer than this, whatever happens to the others.
DEADLINE_SECONDS = 60

FAULTS = ("none", "killed", "terminated", "frozen briefly", "frozen for long", "late", "cannot load", "interrupted")

#: Store operations of a call: a fault comes before one of them.
_OPERATIONS = 14


@dataclass(frozen=True)
class Job:
    """What was drawn for a run."""

    world_size: int
    nodes: int
    launcher: str
    plan: Plan

    def __str__(self) -> str:
        plan = self.plan
        where = "own directories" if plan.has_own_directories else "one directory"
        group = "in a group" if plan.is_in_group else "without a group"
        what = f"rank {plan.victim} {plan.fault} before operation {plan.operation} of call {plan.call}"
        return f"{self.world_size} ranks, {self.launcher}, {group}, {where}, {plan.delivery}: {what}"


def draw(source: random.Random, directory: Path) -> Job:
    """Draw a job and its fault."""
    world_size = source.choice([2, 3, 4])
    nodes = source.choice([1, 2]) if world_size == 4 else 1
    calls = source.choice([1, 2])
    plan = Plan(
        directory=str(directory),
        has_own_directories=source.random() < 0.4,
        is_in_group=source.random() < 0.4,
        delivery=source.choice(["read", "read", "broadcast"]),
        calls=calls,
        victim=source.randrange(world_size),
        fault=source.choice(FAULTS),
        call=source.randrange(calls),
        operation=source.randrange(_OPERATIONS),
    )
    return Job(world_size, nodes, source.choice(["torchrun", "env"]), plan)


def run(source: random.Random, directory: Path) -> tuple[str, str]:
    """No rank hangs, all ranks end alike, with the right tensors, and the next job finds nothing in its way."""
    job = draw(source, directory)
    content = {"w": torch.full((50, 50), source.random())}
    file = directory / "original.pth"
    torch.save(content, file)
    slow = source.random() < 0.3
    with Origin() as origin:
        url = origin.add(NAME, file, Reply(bytes_per_second=20_000 if slow else None))
        held = [job.plan.victim] if job.plan.fault == "late" else []
        with start_ranks(
            make_calls, job.world_size, env=job.launcher, nodes=job.nodes, args=(url, job.plan),
            rank_env=lambda rank: ENVIRONMENT, held=held,
        ) as group:  # fmt: skip
            _meddle(group, job.plan, source)
            results = group.wait(DEADLINE_SECONDS)
        ended = [_ended(result, job.plan) for result in results]
        outcome = judge(job, ended, digest_of(content))
        again = Plan(str(directory), job.plan.has_own_directories)
        for result in run_ranks(
            make_calls, job.world_size, env=job.launcher, nodes=job.nodes, args=(url, again),
            rank_env=lambda rank: ENVIRONMENT,
        ):  # fmt: skip
            assert result.value == [Ended(digest_of(content))], f"the next job: {result.value}, {result.describe()}"
        left = [path.name for path in directory.rglob("*.p*artial")]
        assert not left, f"the next job left {left}"
    return str(job), outcome


def judge(job: Job, ended: list[list[Ended] | None], digest: str) -> str:
    """Say how the job ended; an AssertionError if a promise is broken. None is a rank that was killed."""
    outcomes = set[str]()
    for call in range(job.plan.calls):
        reached = {rank: calls[call] for rank, calls in enumerate(ended) if calls is not None and call < len(calls)}
        failed = {rank for rank, one in reached.items() if one.error}
        assert all(one.digest == digest for one in reached.values() if not one.error), f"wrong tensors: {reached}"
        if failed and failed != reached.keys():
            assert _is_unavoidable(job, ended, failed), f"not one outcome: {reached}"
            outcomes.add("unavoidable")
        outcomes.add("error" if failed else "success")
    return " and ".join(sorted(outcomes))


def _is_unavoidable(job: Job, ended: list[list[Ended] | None], failed: set[int]) -> bool:
    """Tell of what docs/faults.md says: the verdict was there, and its last reader could not read it any more."""
    plan = job.plan
    is_rank_0_dead = plan.victim == 0 and ended[0] is None and job.launcher == "env"
    was_frozen_after_its_vote = plan.fault == "frozen for long" and failed == {plan.victim}
    was_interrupted_after_it = plan.fault == "interrupted" and failed == {plan.victim}
    return is_rank_0_dead or was_frozen_after_its_vote or was_interrupted_after_it


def _meddle(group: RankGroup, plan: Plan, source: random.Random) -> None:
    """Do what the victim cannot do itself."""
    if plan.fault == "late":
        time.sleep(source.uniform(0, 2))
        group.release(plan.victim)
    elif plan.fault.startswith("frozen"):
        seconds = (
            source.uniform(0.1, 1) if plan.fault == "frozen briefly" else source.uniform(1.2, 3) * LIVENESS_SECONDS
        )
        with suppress(RankFailed):  # the call had fewer operations
            group.wait_for_mark("freezes", [plan.victim])
            time.sleep(seconds)
            group.kill(plan.victim, signal.SIGCONT)


def _ended(result: RankResult, plan: Plan) -> list[Ended] | None:
    """Return how the calls of a rank ended; None if it was killed, as it was to be."""
    if result.pickled_value is not None:
        assert result.exitcode == 0, result.describe()
        calls: list[Ended] = result.value
        return calls
    was_to_die = result.rank == plan.victim and plan.fault in ("killed", "terminated")
    assert was_to_die and result.exception is None, result.describe()
    return None


if __name__ == "__main__":
    start("chaos", run)
