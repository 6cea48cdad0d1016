"""Prefetch jobs: what depends on them finds the weights in the cache, or does not start at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.origin import Origin
from cluster.slurm import Slurm
from cluster.templates import TRAIN, assert_trained, ranks_in, settings

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]


def test_training_after_a_prefetch_makes_no_request(slurm: Slurm, origin: Origin, project: Path, weights: Path) -> None:
    url = origin.publish(weights, "prefetched")
    variables = settings(url, project / "cache")
    two_ranks = ("--nodes=2", "--ntasks-per-node=1")

    prefetch = slurm.sbatch(project, "slurm/prefetch.sbatch", **variables)
    after = f"--dependency=afterok:{prefetch.id}"
    training = slurm.sbatch(project, after, *two_ranks, "slurm/train_srun.sbatch", *TRAIN, **variables)

    prefetch.succeeded(60)
    assert [request["method"] for request in origin.requests(url)] == ["GET"]
    assert ranks_in(training.succeeded(90)) == {0: "node1", 1: "node2"}
    assert len(origin.requests(url)) == 1
    assert_trained(project / "trained.pth", weights)


def test_failed_prefetch_takes_its_dependent_job_away(slurm: Slurm, origin: Origin, project: Path) -> None:
    variables = settings(f"{origin.base_url}/absent-0a1b2c3d.pth", project / "cache")

    prefetch = slurm.sbatch(project, "slurm/prefetch.sbatch", **variables)
    after = (f"--dependency=afterok:{prefetch.id}", "--kill-on-invalid-dep=yes")
    training = slurm.sbatch(project, *after, "slurm/train_srun.sbatch", *TRAIN, **variables)

    assert prefetch.wait(30) == "FAILED"
    assert "404" in prefetch.output()
    assert training.wait(30) == "CANCELLED"
