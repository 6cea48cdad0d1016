"""Ray Train on two nodes of a SLURM job: launch/ray_train.py, of which Ray starts the workers again after one dies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.lab import Lab
from cluster.origin import Origin
from cluster.slurm import Slurm
from cluster.templates import settings
from cluster.wait import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

#: Ray measures the machine, and would give itself a third of its memory on every node of the lab.
SMALL = "--num-cpus 2 --object-store-memory 100000000"


@pytest.mark.timeout(300)
def test_ray_train_on_two_nodes_where_a_worker_dies(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "ray")
    variables = {
        **settings(url, project / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the lab anyway
        "RAY_DEDUP_LOGS": "0",  # or of lines that are alike only the first is shown
    }
    train = f"python launch/ray_train.py --workers 4 --storage {project}/runs {url}"
    train += f" --capacity tiny --steps 40 --save-every 1 --model-dir {project}/cache --output {project}/trained.pth"
    ray = f"ray symmetric-run --address node1:6379 --min-nodes 2 {SMALL} -- {train}"
    # The other nodes wait for a minute after the head has ended: two seconds are enough here.
    hurry = "[ $SLURM_PROCID = 0 ] || export RAY_gcs_rpc_server_reconnect_timeout_s=2"
    line = f"srun sh -c '{hurry}; exec {ray}'"
    job = slurm.sbatch(project, "--nodes=2", "--ntasks-per-node=1", f"--wrap={line}", **variables)

    wait_until((project / "runs" / "train" / "state.pt").exists, 120, job.output)
    lab.run("node2", "pkill", "--signal", "KILL", "--full", "ray::RayTrainWorker")
    output = job.succeeded(120)

    nodes = dict(re.findall(r"rank (\d+) of 4 on (\S+) .*steps \d+ to 40, loss", output))
    assert sorted(nodes) == ["0", "1", "2", "3"], output
    assert sorted(nodes.values()) == ["node1", "node1", "node2", "node2"], output
    assert (project / "trained.pth").exists()
    assert len(origin.requests(url)) == 1
    assert origin.body_bytes(url) == weights.stat().st_size
