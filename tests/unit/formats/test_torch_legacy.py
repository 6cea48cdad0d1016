"""torch's format before 1.6: its length is known, and nothing in it is ever run."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from harness import checkpoints
from rankload._formats import torch_legacy as legacy
from rankload._formats.sniff import check_structure
from rankload._formats.torch_legacy import MAGIC
from rankload.errors import NotACheckpointError


def check(path: Path) -> str:
    return check_structure(path, must_be_checkpoint=True, origin="test")


def assert_length_is_known(path: Path) -> None:
    """The whole file passes, one byte less does not."""
    assert check(path) == "legacy"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(NotACheckpointError, match="truncated"):
        check(path)


@pytest.mark.parametrize("content", [checkpoints.state_dict, checkpoints.training_checkpoint])
def test_the_length_of_real_checkpoints_is_known(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    assert_length_is_known(path)


def test_the_length_of_a_pickled_module_is_known(tmp_path):
    path = tmp_path / "model.pth"
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module, path, _use_new_zipfile_serialization=False)  # its classes' sources are in the file
    assert_length_is_known(path)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.int64, torch.float64, torch.complex128],
)
def test_the_length_is_known_for_every_element_size(tmp_path, dtype):
    path = tmp_path / "model.pth"
    torch.save(
        [torch.zeros(5, 3, dtype=dtype), torch.zeros(2, dtype=dtype)], path, _use_new_zipfile_serialization=False
    )
    assert_length_is_known(path)


def test_a_second_object_behind_the_first_is_allowed(tmp_path):
    path = tmp_path / "model.pth"
    with path.open("wb") as file:
        torch.save(torch.ones(3), file, _use_new_zipfile_serialization=False)
        torch.save(torch.zeros(3), file, _use_new_zipfile_serialization=False)
    assert check(path) == "legacy"


def test_a_storage_that_is_not_understood_is_left_to_torch(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"FloatStorage", b"AlienStorage"))
    assert check(path) == "legacy"


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_the_file_is_run(tmp_path):
    path, sprung = tmp_path / "model.pth", tmp_path / "sprung"
    torch.save({"trap": Trap(sprung), "a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert_length_is_known(path)
    assert not sprung.exists()


HEAD = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
DEEP_KEY = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns."  # hashing it would overflow the stack
DOUBLED_KEY = b"\x80\x02})" + b"2\x86" * 64 + b"Ns."  # hashing it would take 2**64 steps


@pytest.mark.parametrize(
    "crafted",
    [DEEP_KEY, DOUBLED_KEY, b"\x80\x02N" + b"2" * 3_000_000 + b"."],
    ids=["deep-key", "doubled-key", "endless"],
)
def test_a_crafted_pickle_costs_no_memory_and_no_time(tmp_path, crafted):
    path = tmp_path / "model.pth"
    path.write_bytes(HEAD + crafted + pickle.dumps([], 2))
    begin = time.thread_time()
    assert check(path) == "legacy"
    assert time.thread_time() - begin < 10


def test_a_huge_memo_is_refused_and_costs_no_memory(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(HEAD + b"\x80\x02Nr\xff\xff\xff\xff." + pickle.dumps([], 2))
    with pytest.raises(NotACheckpointError, match="a memo of unusual numbers"):
        check(path)


@pytest.mark.parametrize("opcode", [b"B", b"X", b"T", b"\x8b", b"\x8d", b"\x8e", b"\x96"])
def test_a_length_beyond_the_file_allocates_nothing(tmp_path, opcode):
    path = tmp_path / "model.pth"
    path.write_bytes(HEAD + b"\x80\x05" + opcode + b"\xff\xff\xff\x7f\0\0\0\0")
    with pytest.raises(NotACheckpointError, match="truncated"):
        check(path)


def test_a_whole_file_with_more_besides_its_tensors_than_is_read_passes(tmp_path, monkeypatch):
    """One that is cut off in its tensors is still found out."""
    monkeypatch.setattr(legacy, "_FIRST_BYTES", 1024)
    monkeypatch.setattr(legacy, "_MAX_BYTES", 16 << 10)
    path = tmp_path / "model.pth"
    torch.save({"note": "x" * 100_000, "w": torch.ones(5)}, path, _use_new_zipfile_serialization=False)
    assert check(path) == "legacy"
    torch.save({"w": torch.ones(100_000)}, path, _use_new_zipfile_serialization=False)
    assert_length_is_known(path)
