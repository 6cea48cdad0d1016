"""The template for Apptainer. Debian 12 has no Apptainer: a stand-in makes the mounts of its documentation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster.lab import REPOSITORY
from cluster.origin import Origin
from cluster.slurm import Slurm
from cluster.templates import TRAIN, assert_trained, ranks_in, settings, user_environment

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

IMAGE_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", "/etc", sys.prefix, sys.base_prefix)


def test_containers_of_a_job_share_the_cache_that_is_bound(
    slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "apptainer")
    programs, image = project / "bin", project / "image"
    programs.mkdir()
    (programs / "apptainer").symlink_to(Path(__file__).with_name("apptainer_stand_in.sh"))
    image.mkdir()
    folders = dict.fromkeys([*IMAGE_FOLDERS, REPOSITORY / "src", REPOSITORY / "launch"])
    (image / "binds").write_text("".join(f"{folder}\n" for folder in folders if os.path.isdir(folder)))
    cache = project.with_name("apptainer-cache")
    variables = {
        **settings(url, cache),
        "IMAGE": str(image),
        "PATH": f"{programs}:{user_environment()['PATH']}",
    }
    options = ("--nodes=2", "--ntasks-per-node=1", "slurm/apptainer.sbatch")
    job = slurm.sbatch(project, *options, *TRAIN, **variables)

    assert ranks_in(job.succeeded(150)) == {0: "node1", 1: "node2"}
    assert_trained(project / "trained.pth", weights)
    assert len(origin.requests(url)) == 1
    assert (cache / url.rpartition("/")[2]).read_bytes() == weights.read_bytes()
