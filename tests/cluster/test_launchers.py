"""Launchers other than SLURM's own: mpirun and submitit on the cluster, and what Kubernetes would start."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.lab import REPOSITORY, Lab, ended
from cluster.origin import Origin
from cluster.slurm import Job, Slurm
from cluster.templates import TRAIN, assert_trained, ranks_in, settings, user_environment
from cluster.wait import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

FOUR_RANKS = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpirun.mpich"])
def test_mpirun_starts_ranks_on_two_nodes(
    mpirun: str, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, mpirun.replace(".", "-"))
    variables = {
        **settings(url, project / "cache"),
        "MPIRUN": mpirun,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    line = f"RANKS=$SLURM_NTASKS launch/mpirun.sh {' '.join(TRAIN)}"
    job = slurm.sbatch(project, "--nodes=2", "--ntasks-per-node=2", f"--wrap={line}", **variables)

    assert ranks_in(job.succeeded(150)) == FOUR_RANKS
    assert_trained(project / "trained.pth", weights)
    assert len(origin.requests(url)) == 1
    assert origin.body_bytes(url) == weights.stat().st_size


@pytest.mark.timeout(400)
def test_submitit_submits_the_training_and_requeues_it(
    slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "submitit")
    training = (url, f"--model-dir={project}/cache", "--capacity=tiny", "--steps=40", "--save-every=1")
    in_project = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", project)
    submit = (*in_project, "python", "launch/submitit_job.py", "--nodes=2", *training)
    [job_id] = re.findall(r"^job (\d+) writes to ", slurm.run(*submit, variables={"OMP_NUM_THREADS": "1"}))
    logs = project / "submitit-logs" / job_id
    job = Job(slurm, job_id, logs / "none")
    wait_until((logs / "checkpoint.pt").exists, 120, lambda: f"nothing was saved:\n{said(logs)}")

    slurm.run("scancel", "--signal=USR2", job_id)  # what submitit's --signal=USR2@90 does before the time limit

    assert job.wait(200) == "COMPLETED", said(logs)
    assert job.field("Restarts") == "1"
    assert ranks_in(said(logs)) == {0: "node1", 1: "node2"}
    [resumed_at] = set(re.findall(r"steps (\d+) to 40", said(logs)))
    assert 0 < int(resumed_at) < 40
    assert len(origin.requests(url)) == 1
    assert (project / "trained.pth").exists()


def said(logs: Path) -> str:
    """What the ranks of a submitit job have printed."""
    return "".join(path.read_text() for path in sorted(logs.iterdir()) if path.suffix in (".out", ".err"))


def test_what_kubernetes_would_start_trains(lab: Lab, origin: Origin, project: Path, weights: Path) -> None:
    """The schemas decide what the API server takes. A node stands for a pod here, and its scratch for the emptyDir."""
    resources = {
        one["kind"]: one for one in yaml.safe_load_all((REPOSITORY / "launch" / "kubernetes.yaml").read_text())
    }
    for resource in resources.values():
        for version in ("1.29", "1.36"):
            kubernetes_validate.validate(resource, version, strict=True)
    name, job = resources["Job"]["metadata"]["name"], resources["Job"]["spec"]
    pod = job["template"]["spec"]
    service, claim = resources["Service"], resources["PersistentVolumeClaim"]
    assert (service["metadata"]["name"], service["spec"]["selector"]) == (pod["subdomain"], {"job-name": name})
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["output"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # What the headless service says where the first pod is.
    hosts = lab.run_dir / "hosts"
    hosts.write_text(hosts.read_text() + f"10.77.0.11 {name}-0.{pod['subdomain']}\n")
    url = origin.publish(weights, "kubernetes")
    places = {"/cache": lab.scratch, "/output": project}

    with contextlib.ExitStack() as stack:
        pods = []
        for index, node in enumerate(lab.nodes[: job["completions"]]):
            given = {"RANKLOAD_URL": url, "OMP_NUM_THREADS": "1", "JOB_COMPLETION_INDEX": str(index)}
            words, variables = container_command(pod["containers"][0], places, given)
            in_project = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", project, *words, *TRAIN)
            environment = {**user_environment(), **variables}
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            pods.append(stack.enter_context(ended(lab.start(node, *in_project, env=environment, **output))))
        outputs = "".join(process.communicate(timeout=150)[0] for process in pods)

    assert [process.returncode for process in pods] == [0] * job["completions"], outputs
    assert ranks_in(outputs) == FOUR_RANKS
    assert_trained(project / "trained.pth", weights)
    size = weights.stat().st_size
    assert size <= origin.body_bytes(url) <= size + 2


def container_command(
    container: dict[str, Any], places: dict[str, Path], given: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """A container's command and variables, with its volumes at other paths."""
    variables = {one["name"]: one["value"] for one in container["env"]} | given
    # Kubernetes replaces $(NAME) in arguments.
    words = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in container["args"]]
    for mount in container["volumeMounts"]:
        path, place = mount["mountPath"], str(places[mount["mountPath"]])
        words = [word.replace(f"={path}/", f"={place}/") for word in words]
        variables = {name: place if value == path else value for name, value in variables.items()}
    return [*container["command"], *words], variables
