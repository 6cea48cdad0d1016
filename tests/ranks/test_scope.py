"""Who shares a download: ranks that share a directory, found out or told."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from rank_functions import load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin
from harness.ranks import run_ranks


def _load_on(rank: int, url: str, dirs: list[str], scope: str, kernels: list[str] | None = None) -> str:
    """Loads into a directory of its own; with ``kernels``, as a rank of another machine that knows it otherwise."""
    from rankload._job import domains

    if kernels is not None:
        domains._kernel = lambda: kernels[rank]  # one machine cannot have two
    return load(rank, url, dirs[rank], scope=scope, headers={"X-Rank": str(rank)})


def _leaders(origin: Origin) -> list[int]:
    return sorted(int(request.headers["x-rank"]) for request in origin.requests())


def _assert_led(
    origin: Origin, file: CheckpointFile, dirs: list[Path], leaders: list[int], scope: str = "auto", **how: object
) -> None:
    url = origin.add(file.name, file.path)
    kernels = how.pop("kernels", None)
    args = (url, [str(path) for path in dirs], scope, kernels)
    results = run_ranks(_load_on, len(dirs), args=args, **how)  # type: ignore[arg-type]
    assert [result.value for result in results] == [digest_of(file.content)] * len(dirs)
    assert _leaders(origin) == leaders
    left = Counter(path.name.partition("-")[0] for path in dirs[0].parent.rglob(".rankload-*"))
    assert not left


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_auto_two_nodes_with_one_directory_download_once(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path, launcher: str
) -> None:
    _assert_led(origin, checkpoint, [tmp_path / "all"] * 4, [0], nodes=2, env=launcher)


def test_auto_two_machines_with_one_directory_find_it_by_the_file_that_rank_0_leaves_there(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    kernels = ["one", "one", "two", "two"]
    _assert_led(origin, checkpoint, [tmp_path / "all"] * 4, [0], nodes=2, kernels=kernels)


@pytest.mark.fault(48)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_auto_each_node_with_a_directory_of_its_own_is_led_by_its_local_rank_0(
    origin: Origin, checkpoint: CheckpointFile, tmp_path: Path, launcher: str
) -> None:
    dirs = [tmp_path / f"node{rank // 2}" for rank in range(6)]
    kernels = [str(path) for path in dirs]
    _assert_led(origin, checkpoint, dirs, [0, 2, 4], nodes=3, env=launcher, kernels=kernels)


def test_auto_three_nodes_of_which_two_share(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    dirs = [tmp_path / ("local" if rank in (2, 3) else "shared") for rank in range(6)]
    kernels = [f"node{rank // 2}" for rank in range(6)]
    _assert_led(origin, checkpoint, dirs, [0, 2], nodes=3, kernels=kernels)


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


def test_job_rank_0_leads_without_looking(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    kernels = ["one", "one", "two", "two"]
    _assert_led(origin, checkpoint, [tmp_path / "all"] * 4, [0], scope="job", nodes=2, kernels=kernels)


def test_process_every_rank_fetches_for_itself(origin: Origin, checkpoint: CheckpointFile, tmp_path: Path) -> None:
    _assert_led(origin, checkpoint, [tmp_path / str(rank) for rank in range(3)], [0, 1, 2], scope="process")


def _load_twice_on(rank: int, urls: list[str], dirs: list[str]) -> list[str]:
    return [_load_on(rank, url, dirs, "auto", dirs) for url in urls]


def test_auto_what_was_found_out_holds_for_the_next_call(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, tmp_path: Path
) -> None:
    files = [checkpoint, other_checkpoint]
    urls = [origin.add(file.name, file.path) for file in files]
    dirs = [str(tmp_path / f"node{rank // 2}") for rank in range(4)]
    results = run_ranks(_load_twice_on, 4, nodes=2, args=(urls, dirs))
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
