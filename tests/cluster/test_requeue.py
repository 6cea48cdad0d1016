"""Jobs that are stopped and queued again: they go on from the step that they had reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.origin import Origin
from cluster.slurm import Job, Slurm
from cluster.templates import assert_trained, ranks_in, settings
from cluster.wait import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
CHUNK_BYTES = 64 * 1024
ON_ITS_WAY_BYTES = 512 * 1024  # has left the origin, and was not in a whole chunk when the ranks had to stop
OPTIONS = ("--capacity", "tiny", "--steps", "60", "--save-every", "1")


@pytest.mark.timeout(400)
def test_job_that_reaches_its_time_limit_goes_on_from_its_step(
    slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "time-limit")
    variables = settings(url, project / "cache")
    job = slurm.sbatch(project, *TWO_NODES, "slurm/train_torchrun.sbatch", *OPTIONS, **variables)
    wait_until_saved(job, project)

    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # what --signal=B:USR1@120 does before the limit

    resumes_where_it_stopped(job)
    assert job.field("Restarts") == "1"
    assert len(origin.requests(url)) == 1  # what it goes on from needs no weights
    assert not checkpoint_of(job, project).exists()
    assert (project / "trained.pth").exists()


@pytest.mark.timeout(400)
def test_preempted_job_resumes_its_download_and_its_training(
    slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    size = weights.stat().st_size
    url = origin.publish(weights, "preempted")
    # One connection, so that its rate is the download's.
    pace = {"RANKLOAD_STREAMS": "1", "RANKLOAD_CHUNK_BYTES": str(CHUNK_BYTES)}
    variables = {**settings(f"{url}?rate={size // 8}", project / "cache"), **pace}
    options = ("--partition=preemptible", *TWO_NODES, "slurm/requeue.sbatch", *OPTIONS)
    job = slurm.sbatch(project, *options, **variables)

    wait_until(
        lambda: kept_bytes(project / "cache", weights.read_bytes()) > size // 4,
        seconds=60,
        failure=lambda: f"no download:\n{job.output()}",
    )
    preempt(slurm, project)
    wait_until_saved(job, project)
    assert job.field("Restarts") == "1"
    first, second = origin.requests(url, "end")
    assert size // 4 < first["body_bytes"] < size
    assert first["body_bytes"] + second["body_bytes"] <= size + ON_ITS_WAY_BYTES
    slurm.run("scancel", "--signal=TERM", job.id)  # what --signal=TERM@120 does before the time limit

    resumes_where_it_stopped(job)
    assert job.field("Restarts") == "2"
    assert len(origin.requests(url)) == 2
    assert (project / "trained.pth").exists()


def test_cancelled_job_stays_cancelled(slurm: Slurm, origin: Origin, project: Path, weights: Path) -> None:
    """Its ranks get the same signal as those of a job that is preempted."""
    url = origin.publish(weights, "cancelled")
    variables = settings(f"{url}?rate=1000", project / "cache")
    options = ("--nodes=1", "--ntasks-per-node=1", "slurm/requeue.sbatch")
    job = slurm.sbatch(project, *options, *OPTIONS, **variables)
    wait_until(lambda: origin.requests(url), 60, lambda: f"no download:\n{job.output()}")

    slurm.run("scancel", job.id)

    assert job.wait(60) == "CANCELLED"
    assert job.field("Restarts") == "0"


def checkpoint_of(job: Job, project: Path) -> Path:
    return project / f"checkpoint-{job.id}.pt"


def wait_until_saved(job: Job, project: Path) -> None:
    wait_until(checkpoint_of(job, project).exists, 120, lambda: f"nothing was saved:\n{job.output()}")


def resumes_where_it_stopped(job: Job) -> None:
    """Wait until the job has ended well: both ranks went on after the step that they had saved."""
    output = job.succeeded(200)
    assert ranks_in(output) == {0: "node1", 1: "node2"}
    [stopped_after] = set(re.findall(r"saved after step (\d+) of 60", output))
    assert set(re.findall(r"steps (\d+) to 60", output)) == {stopped_after}


def preempt(slurm: Slurm, project: Path) -> None:
    """Run a job that wants all nodes, and comes before those of the preemptible partition."""
    slurm.sbatch(project, "--nodes=4", "--exclusive", "--wrap=true").succeeded(90)


def kept_bytes(cache: Path, content: bytes) -> int:
    """How much of the content the cache's partial file has; its size says nothing, for it is reserved at once."""
    for path in cache.glob("*.partial"):
        partial = path.read_bytes()
        starts = range(0, len(content), CHUNK_BYTES)
        return sum(CHUNK_BYTES for at in starts if partial[at:][:CHUNK_BYTES] == content[at:][:CHUNK_BYTES])
    return 0


def test_name_without_a_hash(slurm: Slurm, origin: Origin, project: Path, weights: Path) -> None:
    """Templates check a hash where the name has one."""
    (origin.directory / "weights-v2.pth").write_bytes(weights.read_bytes())
    variables = settings(f"{origin.base_url}/weights-v2.pth", project / "cache")
    slurm.sbatch(project, "slurm/prefetch.sbatch", **variables).succeeded(60)
    options = ("--capacity", "tiny", "--steps", "2")
    slurm.sbatch(project, *TWO_NODES, "slurm/train_srun.sbatch", *options, **variables).succeeded(120)
    assert_trained(project / "trained.pth", weights)
