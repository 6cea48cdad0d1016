"""The cluster that the tests in this directory share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.lab import REPOSITORY, Lab, ended
from cluster.origin import Origin
from cluster.slurm import Slurm


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux: the cluster is made of namespaces")
    with Lab() as lab:
        yield lab
    if not request.session.testsfailed:
        lab.remove_files()


@pytest.fixture(scope="session")
def slurm(lab: Lab) -> Slurm:
    return Slurm(lab)


@pytest.fixture
def project(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own, on all nodes, that holds launch/ and slurm/ as a user's project does."""
    directory = lab.shared / re.sub(r"\W+", "-", request.node.name)
    directory.mkdir()
    for name in ("launch", "slurm"):
        (directory / name).symlink_to(REPOSITORY / name)
    return directory


@pytest.fixture(scope="session")
def origin(lab: Lab) -> Iterator[Origin]:
    directory, journal = lab.run_dir / "www", lab.run_dir / "origin.jsonl"
    directory.mkdir()
    server = Path(__file__).with_name("origin.py")
    command = (sys.executable, server, "10.77.2.2", "8080", directory, journal)
    with ended(lab.start("hub", *command, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Origin("http://hub-wan:8080", directory, journal)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the smaller CREPE, 2 MB."""
    sys.path.insert(0, str(REPOSITORY / "launch"))
    from crepe import Crepe  # type: ignore[import-not-found]

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "crepe_tiny.pth"
    torch.save(Crepe("tiny").state_dict(), path)
    return path
