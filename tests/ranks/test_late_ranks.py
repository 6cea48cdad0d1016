"""Ranks that come late or never, and what those that wait for them tell."""

from __future__ import annotations

import re
import time

import pytest
from rank_functions import load, outcomes, try_to_load

from harness.checkpoints import CheckpointFile, digest_of
from harness.origin import Origin, Reply
from harness.ranks import start_ranks, wait_until


@pytest.mark.fault(54)
@pytest.mark.parametrize("launcher", ["torchrun", "env"])
@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_waited_for(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    short_deadlines: float,
    launcher: str,
    late: int,
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(load, 3, env=launcher, args=(url, cache_dir), held=[late]) as group:
        waiting = 1 if late == 0 else 0
        says = "rank 0 has not made the call yet" if late == 0 else "rank 0 is waiting for rank 2 to make this call"
        wait_until(lambda: says in group.stderr(waiting), 30, f"rank {waiting} says {says!r}")
        group.release(late)
        results = group.wait()
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 3
    assert origin.request_count() == 1


@pytest.mark.parametrize(("missing", "named"), [([0], "0"), ([2], "2"), ([1, 2], "1-2")])
def test_ranks_that_never_come_are_named_on_every_rank(
    origin: Origin,
    checkpoint: CheckpointFile,
    cache_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    missing: list[int],
    named: str,
) -> None:
    monkeypatch.setenv("RANKLOAD_ARRIVAL_SECONDS", "2")
    url = origin.add(checkpoint.name, checkpoint.path)
    present = [rank for rank in range(4) if rank not in missing]
    with start_ranks(try_to_load, 4, args=(url, cache_dir), held=missing) as group:
        ended = outcomes([group.wait_for_end(rank) for rank in present])
    assert [outcome.error for outcome in ended] == ["ArrivalTimeoutError"] * len(present)
    for outcome in ended:
        assert outcome.fields is not None and outcome.fields["missing"] == named
        noun = "rank" if len(missing) == 1 else "ranks"
        assert f"{noun} {named} did not make this call within 2 s" in outcome.text
        assert outcome.ended_at - outcome.started_at < 4


def test_without_rank_0_nobody_hosts_the_store_and_the_error_says_where(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKLOAD_ARRIVAL_SECONDS", "1")
    url = origin.add(checkpoint.name, checkpoint.path)
    with start_ranks(try_to_load, 2, env="env", args=(url, cache_dir), held=[0]) as group:
        [ended] = outcomes([group.wait_for_end(1)])
    assert ended.error == "ArrivalTimeoutError"
    assert re.search(r"rank 0 did not make this call within 1 s.*no store at 127\.0\.0\.1:\d+", ended.text)


def test_an_address_that_no_host_has_is_told_at_once(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    url = origin.add(checkpoint.name, checkpoint.path)
    # it exits when all others have read the reason, or after the liveness limit
    nowhere = {0: {"MASTER_ADDR": "no.such.host.invalid", "RANKLOAD_LIVENESS_SECONDS": "3"}}
    with start_ranks(try_to_load, 2, env="env", args=(url, cache_dir), rank_env=nowhere, held=[1]) as group:
        [ended] = outcomes([group.wait_for_end(0, 80)])
    assert ended.error == "CoordinationError"
    assert "rank 0 cannot open a store at no.such.host.invalid:" in ended.text and "Set MASTER_ADDR" in ended.text
    assert ended.ended_at - ended.started_at < 30  # a name server may be slow to say so


_REPORT = re.compile(
    r"rankload: rank 2 is waiting for rank 0 on \S+: (downloading|publishing) \d+\.\d of \d+\.\d MB \(other\S*\.pth\)"
    r"(, \d+ MB/s)?$"
)
_OWN_REPORT = re.compile(r"rankload: (downloading http\S+|other\S*\.pth: .*)$")


def test_one_rank_of_a_node_says_what_it_waits_for_once_per_report_interval(
    origin: Origin, cache_dir: str, other_checkpoint: CheckpointFile, short_deadlines: float
) -> None:
    url = origin.add(other_checkpoint.name, other_checkpoint.path, Reply(hold_at=2000))
    started = time.monotonic()
    with start_ranks(load, 4, nodes=2, args=(url, cache_dir)) as group:
        wait_until(lambda: group.stderr(2).count("\n") >= 3, 30, "rank 2 has said three things")
        origin.release(other_checkpoint.name)
        results = group.wait()
    intervals = time.monotonic() - started  # of a second each
    assert results[1].stderr == results[3].stderr == ""
    lines = results[2].stderr.splitlines()
    assert 2 <= len(lines) <= intervals
    assert [line for line in lines if not _REPORT.match(line)] == []
    lines = results[0].stderr.splitlines()  # of the rank that downloads
    assert 4 <= len(lines) <= intervals + 2
    assert [line for line in lines if not _OWN_REPORT.match(line)] == []


def test_a_download_that_stands_prints_a_few_lines_and_who_waits_none(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKLOAD_REPORT_SECONDS", "6")  # a fifth of the default
    url = origin.add(checkpoint.name, checkpoint.path, Reply(hold_at=1000))
    with start_ranks(load, 2, args=(url, cache_dir)) as group:
        origin.wait_until_held(checkpoint.name)
        time.sleep(12.5)  # the wait itself is what is tested
        origin.release(checkpoint.name)
        results = group.wait()
    assert [result.value for result in results] == [digest_of(checkpoint.content)] * 2
    downloaded, waited = (result.stderr.splitlines() for result in results)
    assert len(downloaded) == 4 and all(
        line.startswith("rankload: ") for line in downloaded
    )  # at the start, after 6 s, after 12 s, at the end
    assert waited == []
