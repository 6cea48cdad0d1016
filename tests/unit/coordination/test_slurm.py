"""SLURM's notations, and the place where the ranks of a step meet."""

import pytest
from recordings import recorded

from rankload._coordination.slurm import first_host, slurm_step_endpoint, tasks_on_node
from rankload.errors import ArgumentError


@pytest.mark.parametrize(
    ("hostlist", "first"),
    [
        ("node1", "node1"),
        ("n1,n2", "n1"),
        ("node[1-4,7]", "node1"),
        ("node[7,1-4]", "node7"),
        ("a[01-10]b[2,3]", "a01b2"),
        ("gpu-[0008-0011]", "gpu-0008"),
        ("r1c[3]n[12-13].example.org,login", "r1c3n12.example.org"),
        ("login,node[1-4]", "login"),
    ],
)
def test_first_host(hostlist, first):
    assert first_host(hostlist) == first


@pytest.mark.parametrize("hostlist", ["", ",node1", "node[1-4", "node1-4]", "node[]", "node[a-b]", "(null) x"])
def test_what_is_no_hostlist_is_named(hostlist):
    with pytest.raises(ArgumentError, match="SLURM_STEP_NODELIST") as caught:
        first_host(hostlist)
    assert repr(hostlist) in str(caught.value)


@pytest.mark.parametrize(
    ("tasks_per_node", "per_node"),
    [("2(x4)", [2, 2, 2, 2]), ("4,2(x2)", [4, 2, 2]), ("1", [1]), ("2(x2),1,3(x1)", [2, 2, 1, 3])],
)
def test_tasks_on_node(tasks_per_node, per_node):
    nodes = range(len(per_node) + 1)
    assert [tasks_on_node(tasks_per_node, str(node)) for node in nodes] == [*per_node, None]


@pytest.mark.parametrize(("tasks_per_node", "node"), [("", "0"), ("2x4", "0"), ("2(x4)", ""), ("2(x4)", "-1")])
def test_tasks_on_node_are_unknown_rather_than_wrong(tasks_per_node, node):
    assert tasks_on_node(tasks_per_node, node) is None


def test_all_tasks_of_a_step_meet_at_its_first_host():
    first, last = recorded("slurm_srun_uneven_rank0"), recorded("slurm_srun_uneven_rank2")
    assert slurm_step_endpoint(first) == slurm_step_endpoint(last)
    assert slurm_step_endpoint(first)[0] == "node1"


def test_the_port_is_free_of_privileged_ephemeral_and_customary_ones_for_any_job():
    step = recorded("slurm_srun")
    for job_id in [*range(1, 20_000, 7), 2**32 - 1]:
        _, port = slurm_step_endpoint(step | {"SLURM_JOB_ID": str(job_id)})
        assert 1024 < port < 32768
        assert port not in (29400, 29500)


def test_jobs_and_steps_that_run_side_by_side_have_ports_of_their_own():
    step = recorded("slurm_srun")
    ports = {
        slurm_step_endpoint(step | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step_id)})
        for job in range(1000, 1032)
        for step_id in range(31)
    }
    assert len(ports) == 32 * 31


@pytest.mark.parametrize(
    "name",
    ["slurm_batch", "slurm_batch_submitted_from_step", "slurm_salloc_command", "slurm_salloc_interactive"],
)
def test_outside_a_step_there_is_no_place_to_meet(name):
    assert slurm_step_endpoint(recorded(name)) is None


def test_outside_slurm_there_is_no_place_to_meet():
    assert slurm_step_endpoint({}) is None
