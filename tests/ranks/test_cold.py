"""A cold cache: one download, whoever started the ranks."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rank_functions import leftovers, load, load_like_torch

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ports import reserved_port
from harness.ranks import run_ranks
from harness.scripts import run_program, run_torchrun


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
@pytest.mark.parametrize("world_size", [4, 8])
def test_cold_the_origin_serves_the_file_once_and_every_rank_has_torch_loads_tensors(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str, world_size: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(load_like_torch, world_size, env=launcher, args=(url, cache_dir, checkpoint.path))
    assert [result.outcome for result in results] == ["returned"] * world_size
    said, *nothing = [result.stdout + result.stderr for result in results]
    assert re.fullmatch(r"rankload: .*: \S+B in \d+\.\d s, \S+B/s\n", said), said
    assert nothing == [""] * (world_size - 1)
    assert (origin.request_count(), origin.bytes_sent()) == (1, checkpoint.size)
    assert leftovers(cache_dir) == []


UNDER_MPIRUN = """
import json, os, sys
from rankload import RankloadError, dist_fetch
from rankload._coordination.launchers import identity_from_environment

url, other_url, absent_url, cache_dir = sys.argv[1:]
address = {name: os.environ.pop(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
dist_fetch(url, cache_dir)  # only the lease is between the ranks
os.environ.update(address)
dist_fetch(other_url, cache_dir)
try:
    dist_fetch(absent_url, cache_dir)
except RankloadError as error:
    me = identity_from_environment()
    # One write, or the lines of the ranks mix.
    line = [me.launcher, me.rank, me.world_size, me.local_rank, me.local_world_size, error.rank]
    os.write(1, f"{json.dumps(line)}\\n".encode())
"""


@pytest.mark.skipif(shutil.which("mpirun.openmpi") is None, reason="needs openmpi-bin, which tests/run.sh installs")
@pytest.mark.skipif(shutil.which("mpirun.mpich") is None, reason="needs mpich, which tests/run.sh installs")
@pytest.mark.parametrize(("mpirun", "launcher"), [("openmpi", "ompi"), ("mpich", "pmi")])
def test_real_mpirun(
    origin: Origin,
    checkpoint: CheckpointFile,
    other_checkpoint: CheckpointFile,
    cache_dir: str,
    mpirun: str,
    launcher: str,
) -> None:
    files = (checkpoint, other_checkpoint)
    urls = [*(origin.add(file.name, file.path) for file in files), origin.url("absent.pth")]
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--oversubscribe"] if mpirun == "openmpi" else []
    command = [f"mpirun.{mpirun}", "-n", "4", *options, sys.executable, "-c", UNDER_MPIRUN, *urls, cache_dir]
    with reserved_port() as port:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = run_program(command, env={**variables, **address}).check()
    found = sorted(json.loads(line) for line in result.stdout.splitlines())
    assert found == [[launcher, rank, 4, rank, 4, 0] for rank in range(4)], result
    assert [origin.request_count(file.name) for file in files] == [1, 1]


def test_srun_the_ranks_meet_at_the_steps_first_host(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    with reserved_port() as port:
        # the inverse of what a step's ranks compute: 10000 + (31 * job id + step id) mod 16381
        job_id = (port - 10_000) * pow(31, -1, 16_381) % 16_381

        def variables(rank: int) -> Mapping[str, str]:
            return {
                "SLURM_JOB_ID": str(job_id),
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_TASKS_PER_NODE": "4",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NODEID": "0",
                "SLURM_GTIDS": "0,1,2,3",
            }

        url = origin.add(checkpoint.name, checkpoint.path)
        results = run_ranks(load_like_torch, 4, env=variables, args=(url, cache_dir, checkpoint.path))
    assert [result.outcome for result in results] == ["returned"] * 4
    assert (origin.request_count(), origin.bytes_sent()) == (1, checkpoint.size)


def test_without_a_launcher_a_process_is_a_job_of_its_own(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    [result] = run_ranks(load, 1, env="none", args=(url, cache_dir))
    assert result.value == digest_of(checkpoint.content)


@pytest.mark.fault(55)
def test_real_torchrun(origin: Origin, checkpoint: CheckpointFile, cache_dir: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from rankload import dist_load_state_dict_from_url\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from harness.checkpoints import digest_of\n"
        "before = dist_load_state_dict_from_url(*sys.argv[1:])\n"
        "torch.distributed.init_process_group('gloo')\n"
        "after = dist_load_state_dict_from_url(*sys.argv[1:])\n"
        "torch.distributed.destroy_process_group()\n"
        "print(digest_of(before), digest_of(after))\n"
    )
    url = origin.add(checkpoint.name, checkpoint.path)
    result = run_torchrun(script, 4, url, cache_dir).check()
    digest = digest_of(checkpoint.content)
    stdouts = [stdout for stdout, _ in result.worker_streams.values()]
    assert stdouts == [f"{digest} {digest}\n"] * 4, sys.version
    assert origin.request_count() == 1
