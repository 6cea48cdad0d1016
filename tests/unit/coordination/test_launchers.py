"""Who a process is, in environments that real launchers made."""

import subprocess
import sys

import pytest
from recordings import recorded

from rankload._coordination.launchers import identity_from_environment
from rankload._types import Identity
from rankload.errors import ArgumentError

SINGLE = Identity(0, 1, 0, 1, 0, "host", "single")


def identify(environ):
    return identity_from_environment(environ, "host")


# The variable sets of launchers that are not recorded, as their documentation (see LAUNCHERS) gives them.
OPEN_MPI = {  # mpirun of Open MPI 5 also sets PMIX_*
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "3",
    "OMPI_UNIVERSE_SIZE": "16",
    "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "prterun-node1-4711@1",
}
PALS = {
    "PALS_APID": "0aae0d8d-4f1f-4c22-9d0f-6e3a5f6f4d50",
    "PALS_RANKID": "13",
    "PALS_NODEID": "1",
    "PALS_LOCAL_RANKID": "1",
    "PALS_LOCAL_SIZE": "12",
    "PMI_RANK": "13",
    "PMI_SIZE": "24",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "12",
}
HYDRA = {"PMI_RANK": "4", "PMI_SIZE": "5", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
CRAY_PMI = {"PMI_RANK": "4", "PMI_SIZE": "5", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
MVAPICH2 = {  # mpirun_rsh: PMI_ID, not PMI_RANK
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    "PMI_ID": "3",
    "PMI_SIZE": "4",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, SINGLE),
        (TORCHRUN, Identity(3, 8, 1, 2, 1, "host", "torchrun")),
        (OPEN_MPI, Identity(5, 8, 1, 4, None, "host", "ompi")),
        (PALS, Identity(13, 24, 1, 12, 1, "host", "pals")),
        (HYDRA, Identity(4, 5, 1, 2, None, "host", "pmi")),
        (CRAY_PMI, Identity(4, 5, 1, 2, None, "host", "pmi")),
        (MVAPICH2, Identity(3, 4, 1, 2, None, "host", "mvapich")),
        (
            {name.replace("MV2_", "MVP_"): value for name, value in MVAPICH2.items()},
            Identity(3, 4, 1, 2, None, "host", "mvapich"),
        ),
    ],
    ids=["none", "torchrun", "Open MPI", "PALS", "Hydra", "Cray PMI", "MVAPICH2", "MVAPICH 3"],
)
def test_documented_launchers(environ, expected):
    assert identify(environ) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("slurm_srun", Identity(3, 4, 1, 2, 1, "host", "slurm")),
        ("slurm_srun_uneven_rank0", Identity(0, 3, 0, 2, 0, "host", "slurm")),
        ("slurm_srun_uneven_rank2", Identity(2, 3, 0, 1, 1, "host", "slurm")),
        ("slurm_srun_gpus_per_task", Identity(3, 4, 1, 2, 1, "host", "slurm")),
        ("slurm_srun_in_srun", Identity(3, 4, 1, 2, 1, "host", "slurm")),
        ("slurm_srun_in_interactive", Identity(3, 4, 1, 2, 1, "host", "slurm")),
        ("slurm_srun_pty", Identity(0, 1, 0, 1, 0, "host", "slurm")),
        ("slurm_srun_pmi2", Identity(3, 4, 1, 2, 1, "host", "slurm")),
        ("slurm_srun_cray_shasta", Identity(3, 4, 1, 2, 1, "host", "slurm")),
        ("torchrun_in_srun", Identity(3, 4, 1, 2, 1, "host", "torchrun")),
    ],
)
def test_recorded_ranks(name, expected):
    assert identify(recorded(name)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "slurm_batch",
        "slurm_batch_submitted_from_step",
        "slurm_batch_submitted_from_pmi2_step",
        "slurm_batch_submitted_from_cray_step",
        "slurm_salloc_command",
        "slurm_salloc_interactive",
    ],
)
def test_slurm_variables_outside_a_step_are_ignored(name):
    environ = recorded(name)
    assert "SLURM_JOB_ID" in environ
    assert identify(environ) == SINGLE


def test_pmix_from_srun_says_no_more_than_the_step():
    environ = recorded("slurm_srun") | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.1.0"}
    assert identify(environ) == identify(recorded("slurm_srun"))


def test_pmix_that_leaked_into_a_batch_script_is_ignored():
    environ = recorded("slurm_batch_submitted_from_step") | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
    assert identify(environ) == SINGLE


def test_mpiexec_in_a_task_of_srun_tells_its_own_ranks():
    # Hydra's proxies run as the tasks of a step, whose variables all ranks inherit
    proxy = recorded("slurm_srun_pmi2")
    assert identify(proxy | HYDRA) == Identity(4, 5, 1, 2, None, "host", "pmi")


def test_exported_rank_and_world_size_win_and_srun_fills_the_rest():
    environ = recorded("slurm_srun") | {"RANK": "3", "WORLD_SIZE": "4"}
    assert identify(environ) == Identity(3, 4, 1, 2, 1, "host", "torchrun")


def test_nothing_is_taken_from_a_launcher_that_disagrees():
    environ = recorded("slurm_srun") | {"RANK": "3", "WORLD_SIZE": "64"}
    assert identify(environ) == Identity(3, 64, None, None, None, "host", "torchrun")


def test_nothing_is_taken_from_leftovers_that_make_no_sense():
    assert identify({"RANK": "1", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "two"}) == Identity(
        1, 2, None, None, None, "host", "torchrun"
    )


def test_world_size_alone_is_no_launcher():
    # batch scripts export it for their tasks, and are no ranks themselves
    assert identify(recorded("slurm_batch") | {"WORLD_SIZE": "4"}) == SINGLE
    assert identify(recorded("slurm_srun") | {"WORLD_SIZE": "4"}).launcher == "slurm"


def test_empty_variables_count_as_unset():
    assert identify({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}) == SINGLE


def test_a_job_of_one_rank_is_alone_on_its_node():
    assert identify({"RANK": "0", "WORLD_SIZE": "1"}) == Identity(0, 1, 0, 1, 0, "host", "torchrun")


@pytest.mark.parametrize(
    ("environ", "variable", "launcher", "says"),
    [
        ({"RANK": "3"}, "RANK", "torchrun", "WORLD_SIZE is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK", "torchrun", "WORLD_SIZE=4"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK", "torchrun", "'-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK", "torchrun", "WORLD_SIZE=0"),
        ({"RANK": "1", "WORLD_SIZE": "four"}, "WORLD_SIZE", "torchrun", "'four'"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1.0"}, "LOCAL_RANK", "torchrun", "'1.0'"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK", "torchrun", "LOCAL_WORLD_SIZE=2"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "8"}, "OMPI_COMM_WORLD_RANK", "ompi", "OMPI_COMM_WORLD_SIZE=8"),
        ({"PMI_RANK": "0"}, "PMI_RANK", "pmi", "PMI_SIZE is not set"),
        ({"PALS_RANKID": "2", "PALS_NODEID": "0"}, "PALS_RANKID", "pals", "PMI_SIZE is not set"),
        ({"PMIX_RANK": "2", "PMIX_NAMESPACE": "prterun-node1-1@1"}, "PMIX_RANK", "pmix", "RANK and WORLD_SIZE"),
    ],
)
def test_partial_and_nonsensical_values_name_variable_value_and_launcher(environ, variable, launcher, says):
    with pytest.raises(ArgumentError) as caught:
        identify(environ)
    assert (caught.value.variable, caught.value.launcher) == (variable, launcher)
    message = str(caught.value)
    assert variable in message
    assert environ[variable] in message
    assert launcher in message
    assert says in message


def test_nonsense_in_a_slurm_step_is_an_error():
    with pytest.raises(ArgumentError, match=r"SLURM_PROCID='9'.*SLURM_STEP_NUM_TASKS=4"):
        identify(recorded("slurm_srun") | {"SLURM_PROCID": "9"})


def test_this_process_and_host_by_default(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    identity = identity_from_environment()
    assert (identity.rank, identity.launcher) == (3, "torchrun")
    assert identity.host == subprocess.check_output(["hostname"], text=True).strip()


def test_torch_is_not_imported():
    script = "import sys; from rankload._coordination.launchers import identity_from_environment as f; f(); "
    subprocess.run([sys.executable, "-c", script + "sys.exit('torch' in sys.modules)"], check=True, timeout=60)
