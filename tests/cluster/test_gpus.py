"""GPUs as SLURM hands them out. Its device files are fake here, its variables are real: torch is told their number."""

from __future__ import annotations

import json
import sys

import pytest

from cluster.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

REPORT = """
import json, os
from rankload._load.device.devices import Accelerator, choose_device
from rankload._coordination.launchers import identity_from_environment

me = identity_from_environment()
count = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
device = choose_device(Accelerator("cuda", count, current_index=0, is_initialized=False), me)
print(json.dumps([me.launcher, me.rank, me.world_size, me.local_rank, me.local_world_size, me.host, str(device)]))
"""


@pytest.mark.fault(51)
def test_task_with_a_gpu_of_its_own_takes_device_0_whatever_its_local_rank(slurm: Slurm) -> None:
    assert placement(slurm, "--gpus-per-task=1") == [
        ["slurm", 0, 2, 0, 2, "node1", "cuda:0"],
        ["slurm", 1, 2, 1, 2, "node1", "cuda:0"],
    ]


def test_task_that_sees_all_gpus_of_its_node_takes_that_of_its_local_rank(slurm: Slurm) -> None:
    assert placement(slurm, "--gpus-per-node=2") == [
        ["slurm", 0, 2, 0, 2, "node1", "cuda:0"],
        ["slurm", 1, 2, 1, 2, "node1", "cuda:1"],
    ]


def placement(slurm: Slurm, gpus: str) -> list[list[object]]:
    """What each of two tasks of one node takes itself for, and which device it chooses."""
    step = ("srun", "--chdir=/", "--nodelist=node1", "--ntasks=2", gpus, sys.executable, "-c", REPORT)
    return sorted(json.loads(line) for line in slurm.run(*step).splitlines())
