"""Reading into an accelerator, simulated: copies that are made late, as a device makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rankload import adapt, dist_load_into
from rankload._checkpoint.read_index import read_index
from rankload._deliver import upload
from rankload._deliver.boxes import Box, whole
from rankload._deliver.content import open_content
from rankload._deliver.files import CheckpointFiles
from rankload._deliver.module_load import plan_load, prepare_load
from rankload._deliver.saved import TensorInFile
from rankload._deliver.transfers import Transfer
from rankload._deliver.upload import Uploader

DEVICE = torch.device("cuda", 1)


class Device:
    """Makes copies only when somebody waits for them: who overwrites a buffer before that is found out."""

    def __init__(self) -> None:
        self.due: list[Callable[[], object]] = []
        self.largest = 0

    def copy(self, part: torch.Tensor, elements: torch.Tensor) -> None:
        self.due.append(lambda: part.copy_(elements))
        self.largest = max(self.largest, len(self.due))

    def event(self, device: torch.device) -> Any:
        return self

    def record(self, stream: object) -> None:
        """Everything that is due is waited for."""

    def synchronize(self) -> None:
        for copy in self.due:
            copy()
        self.due.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device, empty = Device(), torch.empty

    def empty_unpinned(*sizes: int, pin_memory: bool = False, **words: Any) -> torch.Tensor:
        return empty(*sizes, **words)

    monkeypatch.setattr(upload.torch, "empty", empty_unpinned)
    monkeypatch.setattr(upload.torch, "Event", device.event)
    monkeypatch.setattr(upload.torch.accelerator, "current_stream", lambda device: None)
    monkeypatch.setattr(Uploader, "_copy", lambda self, part, elements: device.copy(part, elements))
    monkeypatch.setattr(upload, "_BUFFER_BYTES", 1024)
    return device


def saved_tensors(path: Path, content: dict[str, torch.Tensor], closing: ExitStack) -> dict[str, TensorInFile]:
    torch.save(content, path)
    files = CheckpointFiles(path, closing)
    index = read_index(files.source(files.name), files.name, files.source, is_remote=False)
    return {name: TensorInFile(entry, files, "little", [], str(path)) for name, entry in index.tensors.items()}


@pytest.mark.parametrize(
    ("shape", "box", "dtype"),
    [
        ((7,), whole((7,)), torch.float32),
        ((), whole(()), torch.float64),
        ((100, 33), whole((100, 33)), torch.float32),  # several buffers
        ((100, 33), Box((20, 0), (51, 33)), torch.bfloat16),  # rows
        ((100, 33), Box((20, 5), (51, 20)), torch.float32),  # many short runs
        ((3, 40, 9), Box((1, 10, 0), (2, 13, 9)), torch.int64),
        ((5, 0), whole((5, 0)), torch.float32),
    ],
)
@pytest.mark.parametrize("target_dtype", [None, torch.float64])
def test_parts_arrive(
    device: Device, tmp_path: Path, shape: tuple[int, ...], box: Box, dtype: torch.dtype, target_dtype: Any
) -> None:
    content = torch.randn(shape).mul(100).to(dtype)
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", {"x": content}, closing)["x"]
        uploader = Uploader(DEVICE)
        destinations = [torch.zeros(box.shape, dtype=target_dtype or dtype) for _ in range(3)]
        for destination in destinations:
            read = uploader.upload(Transfer(saved, destination, box))
            assert read == box.element_count * dtype.itemsize
        uploader.finish()
    part = content[tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))]
    for destination in destinations:
        assert torch.equal(destination, part.to(destination.dtype))
    assert device.largest <= 2


def test_what_it_takes(tmp_path: Path) -> None:
    content = {"x": torch.ones(100, 2000), "transposed": torch.ones(30, 20).t()}
    with FakeTensorMode():
        target = torch.empty(100, 2000, device=DEVICE)
        rows = torch.empty(3, 2000, device=DEVICE)
        columns = torch.empty_strided((100, 3), (2000, 1), device=DEVICE)
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", content, closing)
        assert Uploader.takes(Transfer(saved["x"], target, whole((100, 2000))))
        assert Uploader.takes(Transfer(saved["x"], rows, Box((0, 0), (3, 2000))))
        assert not Uploader.takes(Transfer(saved["x"], columns, Box((0, 0), (100, 3))))
        assert not Uploader.takes(Transfer(saved["x"], torch.empty(100, 2000), whole((100, 2000))))
        assert not Uploader.takes(Transfer(saved["transposed"], target, whole((20, 30))))
        assert not Uploader.takes(Transfer(saved["x"].to(torch.float64), target, whole((100, 2000))))


def test_nothing_is_made_on_another_device(tmp_path: Path) -> None:
    """A module on meta whose rank has the second accelerator."""
    source = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))
    torch.save(source.state_dict(), tmp_path / "file")
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))
    with ExitStack() as closing:
        files = CheckpointFiles(tmp_path / "file", closing)
        names = {*module.state_dict()}
        content = open_content(files, adapt.compose(), names, weights_only=True, mmap=None)
        load = plan_load(module, content, strict=True, assign=None, shown="file")
        with FakeTensorMode(allow_non_fake_inputs=True):
            prepared = prepare_load(load, lambda: DEVICE, assign=None, may_share=True)
            assert {transfer.destination.device for transfer in prepared.transfers} == {DEVICE}
            assert len(prepared.transfers) == len(names) and prepared.bytes_mapped == 0
            prepared.finish()
    assert {tensor.device for tensor in module.state_dict().values()} == {DEVICE}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_into_a_real_accelerator(tmp_path: Path) -> None:
    accelerator = torch.accelerator.current_accelerator()
    source = nn.Sequential(nn.Linear(3000, 2000), nn.BatchNorm1d(2000))
    torch.save(source.state_dict(), tmp_path / "file")
    module = nn.Sequential(nn.Linear(3000, 2000), nn.BatchNorm1d(2000)).to(accelerator)
    with torch.no_grad():
        module[0].weight.zero_()
    dist_load_into(module, tmp_path / "file")
    for name, tensor in source.state_dict().items():
        assert torch.equal(module.state_dict()[name].cpu(), tensor), name
