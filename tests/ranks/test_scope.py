"""Who shares a download: ranks that share a directory, found out or told."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_functions import load

from harness import mounts
from harness.checkpoints import CheckpointFile, digest_of
from harness.nodes import become_node
from harness.origin import Origin
from harness.ranks import run_ranks

needs_machines = pytest.mark.skipif(mounts.why_not() is not None, reason=str(mounts.why_not()))


def _load_on(
    rank: int,
    url: str,
    dirs: list[str],
    scope: str,
    machines: list[int] | None = None,
    directory: Path | None = None,
) -> str:
    """Loads into a directory of its own; with ``machines``, as a rank of that one."""
    if machines is not None:
        assert directory is not None
        become_node(machines[rank], directory)
    return load(rank, url, dirs[rank], scope=scope, headers={"X-Rank": str(rank)})


def _leaders(origin: Origin) -> list[int]:
    return sorted(int(request.headers["x-rank"]) for request in origin.requests())


def _assert_led(
    origin: Origin,
    file: CheckpointFile,
    dirs: list[Path],
    leaders: list[int],
    scope: str = "auto",
    machines: list[int] | None = None,
    **how: Any,
) -> None:
    url = origin.add(file.name, file.path)
    directory = dirs[0].parent
    args = (url, [str(path) for path in dirs], scope, machines, directory)
    results = run_ranks(_load_on, len(dirs), args=args, **how)
    assert [result.value for result in results] == [digest_of(file.content)] * len(dirs)
    assert _leaders(origin) == leaders
    left = Counter(path.name.partition("-")[0] for path in directory.rglob(".rankload-*"))
    assert not left


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_auto_two_nodes_with_one_directory_download_once(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path, launcher: str
) -> None:
    _assert_led(origin, checkpoint, [tmp_path / "all"] * 4, [0], nodes=2, env=launcher)


@needs_machines
def test_auto_two_machines_with_one_directory_find_it_by_the_file_that_rank_0_leaves_there(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    machines = [0, 0, 1, 1]
    _assert_led(origin, checkpoint, [tmp_path / "all"] * 4, [0], nodes=2, machines=machines)


@needs_machines
@pytest.mark.fault(48)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_auto_each_node_with_a_directory_of_its_own_is_led_by_its_local_rank_0(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path, launcher: str
) -> None:
    dirs = [tmp_path / f"node{rank // 2}" for rank in range(6)]
    machines = [rank // 2 for rank in range(6)]
    _assert_led(origin, checkpoint, dirs, [0, 2, 4], nodes=3, env=launcher, machines=machines)


@needs_machines
def test_auto_three_nodes_of_which_two_share(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    dirs = [tmp_path / ("local" if rank in (2, 3) else "shared") for rank in range(6)]
    machines = [rank // 2 for rank in range(6)]
    _assert_led(origin, checkpoint, dirs, [0, 2], nodes=3, machines=machines)


def test_node_one_download_per_node_even_into_one_directory(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_load_on, 4, nodes=2, args=(url, [str(tmp_path / "all")] * 4, "node"))
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 4
    # both nodes lead; the lease on the directory still makes it one download
    assert origin.request_count() == 1


@pytest.mark.fault(48)
def test_node_with_directories_of_their_own(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    dirs = [tmp_path / f"node{rank // 2}" for rank in range(4)]
    _assert_led(origin, checkpoint, dirs, [0, 2], scope="node", nodes=2)


@needs_machines
def test_job_rank_0_leads_without_looking(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    machines = [0, 0, 1, 1]
    _assert_led(origin, checkpoint, [tmp_path / "all"] * 4, [0], scope="job", nodes=2, machines=machines)


def test_process_every_rank_fetches_for_itself(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    _assert_led(origin, checkpoint, [tmp_path / str(rank) for rank in range(3)], [0, 1, 2], scope="process")


def _load_twice_on(rank: int, urls: list[str], dirs: list[str], directory: Path) -> list[str]:
    become_node(rank // 2, directory)
    return [_load_on(rank, url, dirs, "auto") for url in urls]


@needs_machines
def test_auto_what_was_found_out_holds_for_the_next_call(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    files = [checkpoint, other_checkpoint]
    urls = [origin.add(file.name, file.path) for file in files]
    dirs = [str(tmp_path / f"node{rank // 2}") for rank in range(4)]
    results = run_ranks(_load_twice_on, 4, nodes=2, args=(urls, dirs, tmp_path))
    assert [result.value for result in results] == [[digest_of(file.content) for file in files]] * 4
    assert _leaders(origin) == [0, 0, 2, 2]


def test_probe_files_that_killed_ranks_left_are_removed(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    abandoned, recent = tmp_path / ".rankload-probe-old", tmp_path / ".rankload-probe-new"
    for path in (abandoned, recent):
        path.touch()
    two_hours_ago = time.time() - 7200
    os.utime(abandoned, (two_hours_ago, two_hours_ago))
    run_ranks(_load_on, 2, args=(url, [str(tmp_path)] * 2, "auto"), nodes=2)
    assert [path.name for path in tmp_path.glob(".rankload-probe-*")] == [recent.name]


# --- some ranks of a job ----------------------------------------------------------------------------------------------


def _load_in_group(rank: int, url: str, model_dir: str, directory: Path, members: list[int]) -> float:
    """Returns the seconds that the call took."""
    import rankload._api.state_dict  # noqa: F401 - so that what follows is the call alone

    become_node(rank // 2, directory)
    dist.init_process_group("gloo")
    group = dist.new_group(members)
    logging.basicConfig(level=logging.DEBUG)
    dist.barrier()
    started_at = time.monotonic()
    if rank in members:
        load(rank, url, model_dir, headers={"X-Rank": str(rank)}, group=group)
    return time.monotonic() - started_at


@needs_machines
@pytest.mark.parametrize("members", [[0, 2], [1, 3]])
def test_auto_a_group_over_two_machines_as_large_as_one_of_them_finds_the_common_directory_at_once(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path, members: list[int]
) -> None:
    """The group has as many ranks as each machine, and they may all be local ranks 1."""
    url = origin.add(checkpoint.name, checkpoint.path)
    args = (url, str(tmp_path / "all"), tmp_path, members)
    results = run_ranks(_load_in_group, 4, nodes=2, args=args)
    assert "is rank 0's too" in results[members[1]].stderr
    assert _leaders(origin) == members[:1]
    assert max(result.value for result in results) < 1.5
