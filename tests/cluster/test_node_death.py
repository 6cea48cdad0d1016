"""The node of rank 0 loses power in the middle of the download."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.lab import Lab
from cluster.origin import Origin
from cluster.slurm import Job, Slurm
from cluster.templates import ALL_RANKS, TRAIN, assert_trained, ranks_in, settings
from cluster.wait import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

SURVIVORS = [rank for rank, node in ALL_RANKS.items() if node != "node1"]


@pytest.mark.fault(43)
@pytest.mark.timeout(400)
def test_job_whose_first_node_dies_fails_everywhere_and_its_requeue_succeeds(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "node-death")
    slow_url = f"{url}?rate={weights.stat().st_size // 5}"
    job = slurm.sbatch(project, "slurm/train_srun.sbatch", *TRAIN, **settings(slow_url, project / "cache"))
    wait_until(lambda: origin.requests(url), 60, lambda: f"no rank asked for the weights:\n{job.output()}")
    assert origin.clients(url) == ["10.77.2.11"], "rank 0 leads, on node1"

    lab.kill_node("node1")

    wait_until(lambda: len(errors(job)) == len(SURVIVORS), 45, lambda: f"some survivors wait on:\n{job.output()}")
    for rank, error in errors(job).items():
        assert "node1" in error, f"rank {rank} does not say which node is gone: {error}"

    lab.start_node("node1")

    output = job.succeeded(150)
    assert job.field("Restarts") == "1"
    assert ranks_in(output) == ALL_RANKS
    assert_trained(project / "trained.pth", weights)
    assert origin.clients(url) == ["10.77.2.11", "10.77.2.11"]


def errors(job: Job) -> dict[int, str]:
    """The last line of the traceback on each rank that ended with an error of rankload's."""
    found = {}
    for rank in SURVIVORS:
        if raised := re.findall(r"rankload\.\S*Error: .*", job.rank_output(rank), re.MULTILINE):
            found[rank] = raised[-1]
    return found
