"""The templates, as users start them: they train to the end, and the origin counts what it served."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest

from cluster.lab import Lab, ended
from cluster.origin import Origin
from cluster.slurm import Slurm
from cluster.templates import ALL_RANKS, TRAIN, assert_trained, ranks_in, settings, user_environment

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

NODE_ADDRESSES = [f"10.77.2.{number}" for number in range(11, 15)]


def test_template_trains_after_one_download(slurm: Slurm, origin: Origin, project: Path, weights: Path) -> None:
    url = origin.publish(weights, "torchrun")

    job = slurm.sbatch(project, "slurm/train_torchrun.sbatch", *TRAIN, **settings(url, project / "cache"))

    assert ranks_in(job.succeeded(150)) == ALL_RANKS
    assert_trained(project / "trained.pth", weights)
    assert len(origin.clients(url)) == 1 and origin.body_bytes(url) == weights.stat().st_size


def test_weights_that_rank_0_sends_to_nodes_with_caches_of_their_own(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url, model_dir = origin.publish(weights, "broadcast"), lab.scratch / "broadcast"

    options = (*TRAIN, "--delivery", "broadcast")
    job = slurm.sbatch(project, "slurm/train_srun.sbatch", *options, **settings(url, model_dir))

    assert ranks_in(job.succeeded(150)) == ALL_RANKS
    assert_trained(project / "trained.pth", weights)
    assert origin.clients(url) == NODE_ADDRESSES[:1]
    assert origin.body_bytes(url) == weights.stat().st_size
    caches = [lab.run(node, "sh", "-c", f"ls {model_dir} 2>/dev/null || true").split() for node in lab.nodes]
    assert len(caches[0]) == 1 and caches[1:] == [[], [], []]


@pytest.mark.fault(48)
def test_nodes_with_disks_of_their_own_exchange_the_parts_of_one_download(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url, model_dir = origin.publish(weights, "exchange"), lab.scratch / "exchange"
    name = url.rpartition("/")[2]

    # Smaller parts than 8 MiB, or one node would fetch the whole small file.
    variables = {**settings(url, model_dir), "RANKLOAD_CHUNK_BYTES": str(256 * 1024)}
    job = slurm.sbatch(project, "--ntasks-per-node=1", "slurm/node_local.sbatch", *TRAIN, **variables)

    assert ranks_in(job.succeeded(150)) == {0: "node1", 1: "node2", 2: "node3", 3: "node4"}
    assert_trained(project / "trained.pth", weights)
    assert set(origin.clients(url)) == set(NODE_ADDRESSES)
    size = weights.stat().st_size
    assert size <= origin.body_bytes(url) <= size + 4  # a byte for each node that asks which version there is
    for node in lab.nodes:
        lab.run(node, "cmp", model_dir / name, origin.directory / name)


def test_nodes_without_internet_use_what_sbcast_has_brought(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "sbcast")
    sent = project / url.rpartition("/")[2]
    sent.write_bytes(weights.read_bytes())

    variables = {**settings(url, lab.scratch / "sbcast"), "WEIGHTS": str(sent)}
    options = ("--nodes=2", "--ntasks-per-node=1")
    job = slurm.sbatch(project, *options, "slurm/node_local.sbatch", *TRAIN, **variables)

    assert ranks_in(job.succeeded(150)) == {0: "node1", 1: "node2"}
    assert_trained(project / "trained.pth", weights)
    assert origin.requests(url) == []


def test_tasks_of_an_array_share_one_download(slurm: Slurm, origin: Origin, project: Path, weights: Path) -> None:
    url = origin.publish(weights, "array")

    options = ("--array=0-3", "--output=%A_%a.out", "slurm/array.sbatch")
    job = slurm.sbatch(project, *options, *TRAIN, **settings(url, project / "cache"))

    assert len(re.findall(r"^rank 0 of 1 on ", job.succeeded(150), re.MULTILINE)) == 4
    assert len(origin.requests(url)) == 1
    for task in range(4):
        assert_trained(project / f"trained-{task}.pth", weights)


def test_single_node_script_trains_on_one_machine(lab: Lab, origin: Origin, project: Path, weights: Path) -> None:
    url = origin.publish(weights, "single-node")
    variables = {"RANKS_PER_NODE": "2", **settings(url, project / "cache")}

    with ended(by_hand(lab, "node1", project, "launch/single_node.sh", variables)) as script:
        output, _ = script.communicate(timeout=150)

    assert script.returncode == 0, output
    assert ranks_in(output) == {0: "node1", 1: "node1"}
    assert_trained(project / "trained.pth", weights)
    assert origin.clients(url) == NODE_ADDRESSES[:1]


def test_multi_node_script_trains_on_machines_without_a_scheduler(
    lab: Lab, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "multi-node")
    variables = {"FIRST_NODE": "node1", "NODES": "4", "RANKS_PER_NODE": "1", **settings(url, project / "cache")}

    with contextlib.ExitStack() as stack:
        scripts = [
            stack.enter_context(ended(by_hand(lab, node, project, "launch/multi_node.sh", variables)))
            for node in lab.nodes
        ]
        outputs = [script.communicate(timeout=150)[0] for script in scripts]

    assert [script.returncode for script in scripts] == [0, 0, 0, 0], "".join(outputs)
    assert ranks_in("".join(outputs)) == {0: "node1", 1: "node2", 2: "node3", 3: "node4"}
    assert_trained(project / "trained.pth", weights)
    assert len(origin.clients(url)) == 1


def by_hand(lab: Lab, node: str, directory: Path, script: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Type the script's line in a shell on `node`."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shell = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", directory, script, *TRAIN)
    return lab.start(node, *shell, env={**user_environment(), **variables}, **output)
