"""When a checkpoint is copied into the node's memory, and when not."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rankload._coordination.call_context import CallContext
from rankload._coordination.launchers import identity_from_environment
from rankload._coordination.single_process import SingleProcessChannel
from rankload._load.device.devices import Accelerator, Placement
from rankload._load.node import node_copy
from rankload._load.node.held import hold
from rankload._load.node.node_copy import why_copied
from rankload._settings import Settings
from rankload.errors import ProgressTimeoutError

CONTENT = {"w": torch.ones(4)}


@pytest.fixture(params=["zip", "safetensors", "legacy"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"file.{request.param}"
    if request.param == "safetensors":
        save_file(CONTENT, path)
    else:
        torch.save(CONTENT, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


@pytest.fixture
def _with_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copy, "visible_accelerator", lambda: Accelerator("cuda", 1, 0, False))


def test_published_file_on_a_local_disk_stays_mapped(path: Path) -> None:
    assert why_copied(path, None, is_published=True) == ""


def test_file_on_a_network_filesystem_is_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copy, "is_on_local_disk", lambda descriptor: False)
    is_mapped = path.suffix != ".legacy"
    assert ("network" in why_copied(path, None, is_published=True)) == is_mapped


@pytest.mark.parametrize("map_location", [None, "cpu", "cuda:0", {"cpu": "cpu"}, lambda storage, tag: storage])
def test_without_an_accelerator_whatever_would_be_mapped_is_copied(path: Path, map_location: Any) -> None:
    assert bool(why_copied(path, map_location, is_published=False)) == (path.suffix != ".legacy")


@pytest.mark.usefixtures("_with_accelerator")
@pytest.mark.parametrize(
    ("map_location", "stays"),
    [
        (None, True),
        ("cpu", True),
        (torch.device("cpu"), True),
        ("cuda:0", False),
        (torch.device("cuda", 0), False),
        ({"cuda:0": "cpu"}, True),
        ({"cpu": "cuda:0"}, False),
        (Placement(lambda tag: None), True),
        (Placement(lambda tag: torch.device("cuda", 0)), False),
        (lambda storage, tag: storage, True),
    ],
)
def test_what_goes_to_an_accelerator_is_not_copied(path: Path, map_location: Any, stays: bool) -> None:
    """No view of a mapping is left there."""
    assert bool(why_copied(path, map_location, is_published=False)) == (stays and path.suffix != ".legacy")


def test_a_read_that_returns_after_the_call_gave_up_writes_into_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, answers, has_returned = tmp_path / "hung.pth", threading.Event(), threading.Event()
    torch.save(CONTENT, path)
    read, write = os.preadv, os.pwrite

    def hung(*arguments: Any) -> int:
        answers.wait()
        return read(*arguments)

    def noted(*arguments: Any) -> int:
        try:
            return write(*arguments)
        finally:
            has_returned.set()

    monkeypatch.setattr(os, "preadv", hung)
    monkeypatch.setattr(os, "pwrite", noted)
    settings = Settings(progress_seconds=0.2)
    with SingleProcessChannel(identity_from_environment()) as channel, ExitStack() as stack:
        call = CallContext(channel, settings, stack)
        with pytest.raises(ProgressTimeoutError):
            node_copy.with_node_copy(hold(path, None, stack), path, call)
    victims = [tmp_path / f"victim{number}" for number in range(20)]
    with ExitStack() as files:
        for victim in victims:  # they get the numbers of the descriptors that were closed
            files.enter_context(victim.open("xb"))
        answers.set()
        assert has_returned.wait(10)
    assert [victim.read_bytes() for victim in victims] == [b""] * len(victims)
