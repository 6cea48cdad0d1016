"""A cold cache: one download, whoever started the ranks."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rank_functions import leftovers, load, load_like_torch

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ports import reserved_port
from harness.ranks import run_ranks
from harness.scripts import run_torchrun


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


def test_mpirun_without_a_store_the_lease_makes_one_download(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    def variables(rank: int) -> Mapping[str, str]:
        names = {"RANK": rank, "SIZE": 4, "LOCAL_RANK": rank, "LOCAL_SIZE": 4}
        return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}

    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(load_like_torch, 4, env=variables, args=(url, cache_dir, checkpoint.path))
    assert [result.outcome for result in results] == ["returned"] * 4
    assert (origin.request_count(), origin.bytes_sent()) == (1, checkpoint.size)


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
