"""Mapped tensors share the file's pages and never write to it."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.serialization import get_default_mmap_options, set_default_mmap_options

from harness import checkpoints
from rankload._load.state_dict.private_mapping import torch_maps_privately
from rankload._load.state_dict.read_checkpoint import read_checkpoint

MAPPED_FORMATS = [checkpoints.write_zip, checkpoints.write_safetensors]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def overwrite(path: Path) -> None:
    """Load, and write to every byte of every tensor."""
    for tensor in read_checkpoint(path, weights_only=True).values():
        tensor.fill_(1)
        assert tensor.all()


@pytest.mark.parametrize("write", MAPPED_FORMATS)
def test_an_update_in_place_does_not_reach_the_file(tmp_path, write):
    written = write(tmp_path)
    overwrite(written.path)
    assert digest(written.path) == written.sha256


@pytest.mark.fault(57)
@pytest.mark.parametrize("write", MAPPED_FORMATS)
def test_nor_when_the_user_made_shared_mappings_the_default(tmp_path, write):
    written = write(tmp_path)
    with set_default_mmap_options(mmap.MAP_SHARED):
        overwrite(written.path)
        assert get_default_mmap_options() == mmap.MAP_SHARED  # theirs again
    assert get_default_mmap_options() == mmap.MAP_PRIVATE
    assert digest(written.path) == written.sha256


def test_the_precaution_is_needed(tmp_path):
    """torch.load itself does write the file: without this, the tests above could not fail."""
    written = checkpoints.write_zip(tmp_path)
    with set_default_mmap_options(mmap.MAP_SHARED):
        for tensor in torch.load(written.path, mmap=True).values():
            tensor.fill_(1)
    assert digest(written.path) != written.sha256


@pytest.mark.fault(57)
def test_nor_from_many_threads_at_once(tmp_path):
    files = [checkpoints.write_zip(tmp_path, stem=f"model{index}") for index in range(4)]

    def load(path: Path) -> None:
        # Per process in older versions of torch, per thread in newer ones.
        with set_default_mmap_options(mmap.MAP_SHARED):
            overwrite(path)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load, [written.path for written in files] * 5))
    for written in files:
        assert digest(written.path) == written.sha256


def test_a_fork_during_a_load_can_load(tmp_path):
    written = checkpoints.write_zip(tmp_path)
    is_loading, may_end = threading.Event(), threading.Event()

    def load() -> None:
        with torch_maps_privately():
            is_loading.set()
            may_end.wait(60)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        assert is_loading.wait(60)
        child = os.fork()
        if child == 0:
            threading.Timer(60, os._exit, (2,)).start()
            try:
                overwrite(written.path)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        may_end.set()
        thread.join(60)


LOADER = """
import re, sys
import torch
from rankload._load.state_dict.read_checkpoint import read_checkpoint

def pss_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"^Pss: *(\\d+) kB", file.read(), re.MULTILINE)[1]) * 1024

def step(value):
    print(value, flush=True)
    sys.stdin.readline()

read_checkpoint(sys.argv[2])  # a small one: what loading needs anyhow is in memory
before = pss_bytes()
step("ready")
tensors = read_checkpoint(sys.argv[1])
step(sum(tensor.view(torch.uint8).sum().item() for tensor in tensors.values()))
step(pss_bytes() - before)
"""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_processes_of_one_host_share_one_copy(tmp_path, suffix):
    size_bytes = 64 << 20
    tensors = {f"layers.{index}": torch.full((size_bytes // 32,), index, dtype=torch.float32) for index in range(8)}
    write = checkpoints.write_zip if suffix == "pth" else checkpoints.write_safetensors
    path, small = write(tmp_path, tensors).path, write(tmp_path, {"a": torch.ones(9)}, "small").path
    command = [sys.executable, "-c", LOADER, str(path), str(small)]
    ranks = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    # The deadline: a rank that hangs is killed, and what it did not print fails the test.
    watchdog = threading.Timer(120, lambda: [rank.kill() for rank in ranks])
    watchdog.start()
    try:
        answers = []
        for _ in ("ready", "sum", "pss"):
            answers.append([rank.stdout.readline().strip() for rank in ranks])
            for rank in ranks:
                rank.stdin.write("\n")
                rank.stdin.flush()
    finally:
        watchdog.cancel()
        for rank in ranks:
            rank.kill()
            rank.communicate()
    ready, sums, pss = answers
    assert ready == ["ready", "ready"]
    expected = sum(tensor.view(torch.uint8).sum().item() for tensor in tensors.values())
    assert sums == [str(expected)] * 2
    assert size_bytes * 0.9 < sum(map(int, pss)) < size_bytes * 1.2
