"""Jobs that are stopped and queued again: they go on from the step that they had reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.origin import Origin
from cluster.slurm import Slurm
from cluster.templates import assert_trained, ranks_in, settings
from cluster.wait import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
OPTIONS = ("--capacity", "tiny", "--steps", "60", "--save-every", "1")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("template", "reason"), [("train_torchrun", "requeue"), ("train_srun", "time limit")])
def test_requeued_job_goes_on_from_its_step(
    template: str, reason: str, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, f"{template}-{reason.replace(' ', '-')}")
    variables = settings(url, project / "cache")
    job = slurm.sbatch(project, *TWO_NODES, f"slurm/{template}.sbatch", *OPTIONS, **variables)
    checkpoint = project / f"checkpoint-{job.id}.pt"
    wait_until(checkpoint.exists, 120, lambda: f"nothing was saved:\n{job.output()}")

    if reason == "time limit":
        slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # what --signal=B:USR1@120 does before the limit
    else:
        slurm.run("scontrol", "requeue", job.id)

    output = job.succeeded(200)
    assert job.field("Restarts") == "1"
    assert ranks_in(output) == {0: "node1", 1: "node2"}
    resumed = {(int(first), int(last)) for first, last in re.findall(r"steps (\d+) to (\d+)", output)}
    assert len(resumed) == 1 and 0 < min(resumed)[0] < 60
    if reason == "time limit":
        [stopped_after] = set(re.findall(r"saved after step (\d+) of 60", output))
        assert resumed == {(int(stopped_after), 60)}
    assert len(origin.requests(url)) == 1  # what it goes on from needs no weights
    assert not checkpoint.exists()
    assert (project / "trained.pth").exists()


def test_name_without_a_hash(slurm: Slurm, origin: Origin, project: Path, weights: Path) -> None:
    """Templates check a hash where the name has one."""
    (origin.directory / "weights-v2.pth").write_bytes(weights.read_bytes())
    variables = settings(f"{origin.base_url}/weights-v2.pth", project / "cache")
    slurm.sbatch(project, "slurm/prefetch.sbatch", **variables).succeeded(60)
    options = ("--capacity", "tiny", "--steps", "2")
    slurm.sbatch(project, *TWO_NODES, "slurm/train_srun.sbatch", *options, **variables).succeeded(120)
    assert_trained(project / "trained.pth", weights)
