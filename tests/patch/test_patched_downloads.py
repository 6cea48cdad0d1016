"""Ranks that call torch.hub under the patch: failures, deaths, files that go away again."""

from __future__ import annotations

import logging
import os
import urllib.error

import pytest
import torch

import rankload
from harness import checkpoints
from harness.rank import mark, wait_for_gate
from harness.ranks import run_ranks, start_ranks
from harness.replies import Reply
from harness.waiting import wait_until


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoints.write_zip(tmp_path / "source")


def load(rank, url, home):
    os.environ["TORCH_HOME"] = home
    logging.basicConfig(level=logging.INFO)
    with rankload.patch():
        try:
            return len(torch.hub.load_state_dict_from_url(url, progress=False))
        except urllib.error.HTTPError as error:
            return error.code, type(error).__name__, str(error)


@pytest.mark.fault(89)
def test_a_failure_is_shared_instead_of_tried_one_after_the_other(origin, tmp_path):
    url = origin.add("model.pth", b"", Reply(status=404))
    values = [result.value for result in run_ranks(load, 4, args=(url, str(tmp_path)))]
    assert {(code, name) for code, name, _ in values} == {(404, "HTTPStatusError")}
    assert sum("its traceback is there" in text for _, _, text in values) == 3
    assert origin.request_count() == 1


def load_and_try_again(rank, url, home):
    first = load(rank, url, home)
    mark("failed")
    wait_for_gate("mended")
    return first, load(rank, url, home)


@pytest.mark.fault(89)
def test_a_second_call_is_a_second_try(origin, tmp_path, checkpoint):
    url = origin.add(checkpoint.name, b"", Reply(status=404))
    with start_ranks(load_and_try_again, 3, args=(url, str(tmp_path))) as job:
        job.wait_for_mark("failed")
        origin.add(checkpoint.name, checkpoint.path)
        job.open_gate("mended")
        results = [result.value for result in job.wait()]
    assert {first[0] for first, _ in results} == {404}
    assert {second for _, second in results} == {len(torch.load(checkpoint.path))}
    assert origin.request_count(checkpoint.name) == 2


@pytest.mark.fault(89)
def test_another_rank_takes_over_from_one_that_dies_while_it_leads(origin, tmp_path, checkpoint):
    url = origin.add(checkpoint.name, checkpoint.path, hold_at=1000)
    with start_ranks(load, 3, args=(url, str(tmp_path))) as job:
        origin.wait_until_held(checkpoint.name)
        wait_until(lambda: any("Downloading" in job.stderr(rank) for rank in range(3)), 30, "one leads")
        [leader] = [rank for rank in range(3) if "Downloading" in job.stderr(rank)]
        origin.add(checkpoint.name, checkpoint.path)
        job.kill(leader)
        results = job.wait()
    values = [result.value for rank, result in enumerate(results) if rank != leader]
    assert values == [len(torch.load(checkpoint.path))] * 2
    assert origin.request_count() <= 2 + 1  # what the dead one had asked for, one more, and a range of it


def download_and_remove(rank, url, directory):
    found = []
    with rankload.patch():
        for turn in range(2):
            path = f"{directory}/archive.bin"
            torch.hub.download_url_to_file(url, path, progress=False)
            mark(f"downloaded {turn}")
            wait_for_gate(f"removed {turn}")
            found.append(os.path.exists(path))
    torch.hub.download_url_to_file(url, f"{directory}/{rank}.bin", progress=False)
    return found


def test_files_that_a_script_removes_again(origin, tmp_path):
    url = origin.add("archive.bin", b"content")
    with start_ranks(download_and_remove, 3, args=(url, str(tmp_path))) as job:
        for turn in range(2):
            job.wait_for_mark(f"downloaded {turn}")
            assert (tmp_path / "archive.bin").read_bytes() == b"content"
            assert origin.request_count() == turn + 1
            (tmp_path / "archive.bin").unlink()
            job.open_gate(f"removed {turn}")
        assert [result.value for result in job.wait()] == [[False, False]] * 3
    assert origin.request_count() == 2 + 3  # without the patch each rank for itself


def load_late(rank, url, directory):
    if rank == 1:
        wait_for_gate("gone")
    with rankload.patch():
        torch.hub.download_url_to_file(url, f"{directory}/archive.bin", progress=False)
    mark("there")
    return os.path.exists(f"{directory}/archive.bin")


def test_a_late_rank_downloads_again_what_another_one_has_removed(origin, tmp_path):
    url = origin.add("archive.bin", b"content")
    with start_ranks(load_late, 2, args=(url, str(tmp_path))) as job:
        job.wait_for_mark("there", ranks=[0])
        (tmp_path / "archive.bin").unlink()
        job.open_gate("gone")
        assert [result.value for result in job.wait()] == [True, True]
    assert origin.request_count() == 2


def load_where_it_was(rank, url, home):
    os.environ["TORCH_HOME"] = home
    own = rankload.hub.load_state_dict_from_url(url, progress=False)["weight"].device.type
    with rankload.patch():
        try:
            torch.hub.load_state_dict_from_url(url, progress=False)
        except RuntimeError as error:
            return own, str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch's error on a machine without CUDA")
def test_map_location_none_has_torchs_meaning(origin, tmp_path):
    path = checkpoints.write_tagged(tmp_path / "tagged", {"weight": "cuda:0"}).path
    url = origin.add(path.name, path)
    [result] = run_ranks(load_where_it_was, 1, env="none", args=(url, str(tmp_path)))
    own, message = result.value
    assert own == "cpu"
    assert "CUDA" in message
