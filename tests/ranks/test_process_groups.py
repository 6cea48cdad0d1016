"""Process groups: before, after, beside and instead of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_functions import load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin, Reply
from harness.ports import reserved_port
from harness.rank import mark, wait_for_gate
from harness.ranks import run_ranks, start_ranks, wait_until


def _sum_over_ranks(group: Any = None) -> float:
    counted = torch.ones(1)
    dist.all_reduce(counted, group=group)
    return counted.item()


def _load_in_a_group(rank: int, url: str, model_dir: str) -> tuple[str, float]:
    dist.init_process_group("gloo")
    digest = load(rank, url, model_dir)
    total = _sum_over_ranks()
    dist.destroy_process_group()
    return digest, total


@pytest.mark.fault(55)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_after_init_process_group(origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_load_in_a_group, 4, env=launcher, args=(url, cache_dir))
    assert [result.value for result in results] == [(digest_of(checkpoint.content), 4)] * 4
    assert origin.request_count() == 1


def _load_around_groups(rank: int, url: str, model_dir: str, groups: int) -> tuple[list[str], list[float]]:
    digests, totals = [load(rank, url, model_dir)], []
    for _ in range(groups):
        dist.init_process_group("gloo")
        digests.append(load(rank, url, model_dir))
        totals.append(_sum_over_ranks())
        dist.destroy_process_group()
        digests.append(load(rank, url, model_dir))
    return digests, totals


# Not two groups under torchrun: gloo's second init over the agent's store hangs, with rankload or without (torch 2.13).
@pytest.mark.fault(55)
@pytest.mark.parametrize(("launcher", "groups"), [("torchrun", 1), ("env", 2)])
def test_before_a_group_in_it_after_its_end_and_in_the_next_one(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, launcher: str, groups: int
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_load_around_groups, 4, env=launcher, args=(url, cache_dir, groups))
    digest = digest_of(checkpoint.content)
    assert [result.value for result in results] == [([digest] * (1 + 2 * groups), [4.0] * groups)] * 4
    assert origin.request_count() == 1


def _load_after_a_group(rank: int, url: str, model_dir: str) -> str:
    dist.init_process_group("gloo")
    _sum_over_ranks()
    if rank == 0:
        wait_for_gate("rank 0 destroys")
    dist.destroy_process_group()
    mark("destroyed")
    return load(rank, url, model_dir)


def test_after_destroy_process_group_with_the_old_store_still_open_in_rank_0(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(_load_after_a_group, 3, env="env", args=(url, cache_dir)) as group:
        group.wait_for_mark("destroyed", [1, 2])  # they go on to meet at the store that rank 0 is to close
        group.open_gate("rank 0 destroys")
        results = group.wait()
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 3


def _load_in_subgroups(rank: int, urls: list[str], model_dir: str) -> tuple[str, str, str]:
    dist.init_process_group("gloo")
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    singles = [dist.new_group([member]) for member in range(4)]
    everybody = dist.new_group([0, 1, 2, 3])
    half = load(rank, urls[rank // 2], model_dir, group=halves[rank // 2])
    single = load(rank, urls[rank % 2], model_dir, group=singles[rank])
    whole = load(rank, urls[0], model_dir, group=everybody)
    dist.destroy_process_group()
    return half, single, whole


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
def test_two_groups_load_two_urls_at_the_same_time(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str, launcher: str
) -> None:
    files = [checkpoint, other_checkpoint]
    urls = [origin.add(file.name, file.path) for file in files]
    results = run_ranks(_load_in_subgroups, 4, env=launcher, args=(urls, cache_dir))
    first, other = (digest_of(file.content) for file in files)
    assert [result.value for result in results] == [
        (first, first, first),
        (first, other, first),
        (other, first, first),
        (other, other, first),
    ]
    assert [origin.request_count(file.name) for file in files] == [1, 1]


def _interleave_groups(rank: int, urls: list[str], model_dir: str) -> list[str]:
    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 1, 2]), dist.new_group([2, 1, 0])]
    digests = [load(rank, urls[turn % 2], model_dir, group=groups[turn % 2]) for turn in range(6)]
    digests += [load(rank, urls[1], model_dir), load(rank, urls[0], model_dir, group=groups[0])]
    dist.destroy_process_group()
    return digests


def test_two_groups_of_the_same_ranks_take_turns(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str
) -> None:
    urls = [origin.add(file.name, file.path) for file in (checkpoint, other_checkpoint)]
    results = run_ranks(_interleave_groups, 3, args=(urls, cache_dir))
    first, other = digest_of(checkpoint.content), digest_of(other_checkpoint.content)
    assert [result.value for result in results] == [[first, other] * 3 + [other, first]] * 3
    assert origin.request_count() == 2


def _load_in_an_impatient_group(rank: int, url: str, model_dir: str) -> tuple[str, float]:
    dist.init_process_group("gloo")
    set_timeout = dist.distributed_c10d._set_pg_timeout  # of the ranks' meeting itself it would be too short
    set_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    digest = load(rank, url, model_dir)
    set_timeout(timedelta(seconds=60), dist.group.WORLD)
    return digest, _sum_over_ranks()


@pytest.mark.fault(41)
def test_the_groups_own_timeout_is_shorter_than_the_download(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, short_deadlines: float
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(_load_in_an_impatient_group, 3, args=(url, cache_dir)) as group:
        # a line a second: they have waited for twice the group's timeout
        wait_until(lambda: " of " in group.stderr(0), 30, "the others have waited for a second")
        origin.release(checkpoint.name)
        results = group.wait()
    assert [result.value for result in results] == [(digest_of(checkpoint.content), 3)] * 3


def _not_a_member(rank: int, url: str, model_dir: str) -> str:
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    try:
        return load(rank, url, model_dir, group=pair)
    except ValueError as error:
        return str(error)


def test_a_rank_outside_group_is_told_so(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    results = run_ranks(_not_a_member, 3, args=(url, cache_dir))
    assert [result.value for result in results[:2]] == [digest_of(checkpoint.content)] * 2
    assert "not a member of group=" in results[2].value


def _load_in_one_of_two_worlds(rank: int, urls: list[str], model_dir: str) -> str:
    world, rank_in_world = divmod(rank, 2)
    server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    store = dist.PrefixStore(f"world-{world}", server)
    dist.init_process_group("gloo", store=store, rank=rank_in_world, world_size=2)
    digest = load(rank, urls[world], model_dir)
    dist.destroy_process_group()
    return digest


def test_two_worlds_on_one_store(
    origin: Origin, checkpoint: CheckpointFile, other_checkpoint: CheckpointFile, cache_dir: str
) -> None:
    """They have ranks, groups and calls of the same names."""
    files = (checkpoint, other_checkpoint)
    urls = [origin.add(file.name, file.path) for file in files]
    results = run_ranks(_load_in_one_of_two_worlds, 4, env="torchrun", args=(urls, cache_dir))
    expected = [digest_of(file.content) for file in files for _ in range(2)]
    assert [result.value for result in results] == expected


def _ask_for_own_device_alone(rank: int, file: str, model_dir: str, port: int) -> list[str]:
    """Loads without the others in each way that there is; returns the errors. Rank 0 knows its device."""
    import rankload
    from rankload import hub
    from rankload._load.device import devices

    devices.visible_accelerator = lambda: devices.Accelerator("cuda", 4, 0, False)  # the machine may have none
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    single = [dist.new_group([member]) for member in range(3)][rank]
    calls: list[Callable[[], object]] = [
        lambda: rankload.load(file, "{device}"),
        lambda: hub.load_state_dict_from_url(f"file://{file}", model_dir, "{device}"),
        lambda: rankload.dist_load_state_dict_from_url(file, map_location="{device}", group=single),
    ]
    errors = []
    for call in calls if rank else []:
        with pytest.raises(rankload.RankloadError) as caught:
            call()
        errors.append(f"{type(caught.value).__name__}: {caught.value}")
    return errors


def test_a_rank_spawned_without_launcher_does_not_take_itself_for_local_rank_0_when_it_loads_alone(
    checkpoint: CheckpointFile, cache_dir: str
) -> None:
    with reserved_port() as port:
        results = run_ranks(_ask_for_own_device_alone, 3, env="none", args=(str(checkpoint.path), cache_dir, port))
    for result in results[1:]:
        assert len(result.value) == 3
        for error in result.value:
            assert error.startswith("DeviceError: no cuda device is known to belong to rank"), error


def _load_beside_variables(rank: int, url: str, model_dir: str, port: int) -> tuple[str, str]:
    import rankload

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    singles = [dist.new_group([member]) for member in range(2)]
    path = rankload.dist_fetch(url, model_dir)
    rankload.load(path)
    return load(rank, url, model_dir), load(rank, url, model_dir, group=singles[rank])


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-x@1"}])
@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_a_group_counts_more_than_variables_that_say_half(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, variables: dict[str, str], ranks: tuple[int, ...]
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with reserved_port() as port:
        environment = dict.fromkeys(ranks, variables)
        results = run_ranks(_load_beside_variables, 2, env="none", rank_env=environment, args=(url, cache_dir, port))
    assert [result.value for result in results] == [(digest_of(checkpoint.content),) * 2] * 2
