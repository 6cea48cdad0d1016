"""Reading into an accelerator through pinned memory: simulated, with copies that are made late, and on a real one."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rankload import adapt, dist_load_into
from rankload._formats.read_index import read_index
from rankload._load.device import pinned
from rankload._load.device.devices import Accelerator
from rankload._load.device.pinned import staged
from rankload._load.device.readers import Limits, Readers
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.content import open_content
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.module_load import plan_load, prepare_load
from rankload._load.module.regions import Region, whole
from rankload._load.streams import own_parts
from rankload._load.streams.own_parts import is_of_long_runs, upload_parts
from rankload._load.streams.run import read_all
from rankload._load.streams.whole_tensors import is_of_whole, upload_whole
from rankload.errors import LoadError, ProgressTimeoutError

DEVICE = torch.device("cuda", 1)
CPU = torch.device("cpu")
LIMITS = Limits(3, 60)


# --- the ring of buffers ----------------------------------------------------------------------------------------------


class Stream:
    """Makes copies only when somebody waits for them: who overwrites a buffer before that is found out."""

    def __init__(self) -> None:
        self._due: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self.most_due = 0

    def put(self, copy: Callable[[], object]) -> None:
        with self._lock:
            self._due.append(copy)
            self.most_due = max(self.most_due, len(self._due))

    def event(self, device: torch.device) -> Any:
        return Event(self)

    def make(self, count: int) -> None:
        with self._lock:
            for copy in self._due[:count]:
                copy()
            del self._due[:count]


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream, self._count = stream, 0

    def record(self, stream: object) -> None:
        self._count = len(self._stream._due)

    def synchronize(self) -> None:
        self._stream.make(self._count)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream, empty = Stream(), torch.empty

    def empty_unpinned(*sizes: int, pin_memory: bool = False, **words: Any) -> torch.Tensor:
        return empty(*sizes, **words)

    monkeypatch.setattr(pinned.torch, "empty", empty_unpinned)
    monkeypatch.setattr(pinned.torch, "Event", stream.event)
    monkeypatch.setattr(pinned.torch.accelerator, "current_stream", lambda device: None)
    monkeypatch.setattr(pinned.torch.accelerator, "set_device_index", lambda device: None)
    return stream


class Numbers:
    """A job that reads one value, many times."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __len__(self) -> int:
        return 100 + self.value

    def fill(self, address: int) -> None:
        ctypes.memset(address, self.value, len(self))


@pytest.mark.parametrize("thread_count", [1, 2, 5])
def test_no_buffer_is_written_to_before_it_was_copied(stream: Stream, thread_count: int) -> None:
    copies: dict[int, torch.Tensor] = {}

    def copy(number: int, content: torch.Tensor) -> None:
        copies[number] = content.clone()

    jobs = [Numbers(value) for value in range(40)]
    for job, content in staged(jobs, DEVICE, Limits(thread_count, 60), lambda: None, "shown"):
        stream.put(lambda number=job.value, content=content: copy(number, content))
    assert len(copies) == 40
    assert all(torch.equal(found, torch.full((100 + value,), value)) for value, found in copies.items())
    assert 2 <= stream.most_due <= thread_count + 1


def test_nothing_to_read_takes_nothing() -> None:
    assert list(staged([], CPU, LIMITS, lambda: None, "shown")) == []


class Failing(Numbers):
    def fill(self, address: int) -> None:
        raise LoadError("the file ended")


def test_an_error_of_a_thread_is_raised_in_its_turn() -> None:
    found = []
    with pytest.raises(LoadError, match="the file ended"):
        for job, _ in staged([Numbers(1), Numbers(2), Failing(3), Numbers(4)], CPU, LIMITS, lambda: None, "shown"):
            found.append(job.value)
    assert found == [1, 2]


class Hanging(Numbers):
    ends = threading.Event()

    def fill(self, address: int) -> None:
        self.ends.wait(60)


def test_a_file_that_does_not_answer_keeps_nobody_from_hearing_of_a_failure() -> None:
    def check_cancelled() -> None:
        raise LoadError("another's")

    with pytest.raises(LoadError, match="another's"):
        list(staged([Hanging(1)], CPU, LIMITS, check_cancelled, "shown"))
    assert not Hanging.ends.is_set()
    Hanging.ends.set()


def test_a_file_that_never_answers_is_given_up() -> None:
    Hanging.ends.clear()
    looks: list[None] = []
    with pytest.raises(ProgressTimeoutError, match=r"the file: no byte.*timeout="):
        list(staged([Hanging(1)], CPU, Limits(1, 0.2), lambda: looks.append(None), "the file"))
    assert looks
    Hanging.ends.set()


def test_memory_that_cannot_be_pinned_is_used_as_it_is(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def fail(*sizes: int, pin_memory: bool = False, **words: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **words)

    monkeypatch.setattr(pinned.torch, "empty", fail)
    assert [content.tolist() for _, content in staged([Numbers(1)], DEVICE, LIMITS, lambda: None, "shown")] == [
        [1] * 101
    ]


def test_which_devices_are_filled_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "visible_accelerator", lambda: None)
    assert not pinned.is_staged(DEVICE)
    for accelerator, expected in {"cuda": [True, False, False], "mps": [False, False, False]}.items():
        monkeypatch.setattr(pinned, "visible_accelerator", lambda kind=accelerator: Accelerator(kind, 1, 0, False))
        assert [pinned.is_staged(torch.device(kind)) for kind in ("cuda", "cpu", "mps")] == expected


def test_readers_that_are_left_cancel_what_has_not_begun() -> None:
    Hanging.ends.clear()
    with Readers(1) as readers:
        begun = threading.Event()
        running = readers.submit(lambda: begun.set() or Hanging.ends.wait(60))
        waiting = readers.submit(lambda: None)
        assert begun.wait(60)
    assert waiting.cancelled() and not running.done()
    Hanging.ends.set()
    assert running.result(timeout=60) is None


# --- tensors ----------------------------------------------------------------------------------------------------------


def saved_tensors(path: Path, content: dict[str, torch.Tensor], closing: ExitStack) -> dict[str, FileTensor]:
    torch.save(content, path)
    files = CheckpointFiles(path, closing)
    index = read_index(files.source(files.name), files.name, files.source, is_remote=False)
    return {name: FileTensor(entry, files, "little", [], str(path)) for name, entry in index.tensors.items()}


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (own_parts, pinned):
        monkeypatch.setattr(module, "BUFFER_BYTES", 1024)


@pytest.mark.parametrize(
    ("shape", "region", "dtype"),
    [
        ((7,), whole((7,)), torch.float32),
        ((), whole(()), torch.float64),
        ((100, 33), whole((100, 33)), torch.float32),  # several buffers
        ((100, 33), Region((20, 0), (51, 33)), torch.bfloat16),  # rows
        ((100, 33), Region((20, 5), (51, 20)), torch.float32),  # many short runs
        ((3, 40, 9), Region((1, 10, 0), (2, 13, 9)), torch.int64),
        ((5, 0), whole((5, 0)), torch.float32),
    ],
)
@pytest.mark.parametrize("target_dtype", [None, torch.float64])
@pytest.mark.usefixtures("small_buffers")
def test_parts_arrive(
    tmp_path: Path, shape: tuple[int, ...], region: Region, dtype: torch.dtype, target_dtype: Any
) -> None:
    content = torch.randn(shape).mul(100).to(dtype)
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", {"x": content}, closing)["x"]
        destinations = [torch.zeros(region.shape, dtype=target_dtype or dtype) for _ in range(3)]
        copies = [TensorCopy(saved, destination, region) for destination in destinations]
        assert upload_parts(copies, CPU, LIMITS, lambda done: None) == 3 * region.element_count * dtype.itemsize
    part = content[tuple(slice(at, at + size) for at, size in zip(region.offset, region.shape, strict=True))]
    for destination in destinations:
        assert torch.equal(destination, part.to(destination.dtype))


def odd_tensors() -> dict[str, torch.Tensor]:
    """Many small ones, large ones, empty ones, views of one another, other layouts and dtypes."""
    torch.manual_seed(5)
    base = torch.randn(70, 90)
    return {
        **{f"small{number}": torch.randn(number) for number in range(40)},
        "scalar": torch.tensor(7),
        "large": torch.randn(300, 50),
        "transposed": torch.randn(40, 60).t(),
        "channels_last": torch.randn(2, 9, 5, 4).to(memory_format=torch.channels_last),
        "base": base,
        "view": base[3:20],
        "flags": torch.rand(1001) > 0.5,
        "half": torch.randn(999).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
    }


def odd_destinations(content: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    into: dict[str, Any] = {"half": {"dtype": torch.float32}, "large": {"dtype": torch.float64}}
    made = {name: torch.empty_like(tensor, device=device, **into.get(name, {})) for name, tensor in content.items()}
    made["transposed"] = torch.empty(60, 40, device=device)
    made["channels_last"] = torch.empty(2, 9, 5, 4, device=device)
    made["base"] = torch.empty(90, 70, device=device).t()
    return made


@pytest.mark.usefixtures("small_buffers")
def test_whole_tensors_arrive(tmp_path: Path) -> None:
    content = odd_tensors()
    destinations = odd_destinations(content, CPU)
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", content, closing)
        copies = [TensorCopy(saved[name], into, whole(tuple(into.shape))) for name, into in destinations.items()]
        assert all(map(is_of_whole, copies))
        reported: list[int] = []
        read = upload_whole(copies, CPU, LIMITS, reported.append)
    for name, destination in destinations.items():
        assert torch.equal(destination, content[name].to(destination.dtype)), name
    assert reported[-1] == read <= (tmp_path / "file").stat().st_size


@pytest.mark.usefixtures("small_buffers")
def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", {"x": torch.ones(10000)}, closing)["x"]
        with (tmp_path / "file").open("r+b") as file:
            file.truncate(20000)
        with pytest.raises(LoadError, match="ended within its tensors"):
            upload_whole([TensorCopy(saved, torch.empty(10000), whole((10000,)))], CPU, LIMITS, lambda done: None)


def test_which_tensors_go_which_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_parts, "is_staged", lambda device: device.type == "cuda")
    content = {"x": torch.ones(100, 2000), "transposed": torch.ones(30, 20).t(), "expanded": torch.ones(9).expand(5, 9)}
    with FakeTensorMode():
        target = torch.empty(100, 2000, device=DEVICE)
        rows = torch.empty(3, 2000, device=DEVICE)
        columns = torch.empty_strided((100, 3), (2000, 1), device=DEVICE)
        other = torch.empty(20, 30, device=DEVICE)
        fives = torch.empty(5, 9, device=DEVICE)
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", content, closing)
        assert is_of_whole(TensorCopy(saved["x"], target, whole((100, 2000))))
        assert is_of_whole(TensorCopy(saved["x"].to(torch.float64), target, whole((100, 2000))))
        assert is_of_whole(TensorCopy(saved["transposed"], other, whole((20, 30))))
        assert not is_of_whole(TensorCopy(saved["x"], rows, Region((0, 0), (3, 2000))))
        assert not is_of_whole(TensorCopy(saved["expanded"], fives, whole((5, 9))))
        assert is_of_long_runs(TensorCopy(saved["x"], rows, Region((0, 0), (3, 2000))))
        assert not is_of_long_runs(TensorCopy(saved["x"], columns, Region((0, 0), (100, 3))))
        assert not is_of_long_runs(TensorCopy(saved["x"], torch.empty(3, 2000), Region((0, 0), (3, 2000))))
        assert not is_of_long_runs(TensorCopy(saved["transposed"], rows, Region((0, 0), (3, 30))))


def test_nothing_is_made_on_another_device(tmp_path: Path) -> None:
    """A module on meta whose rank has the second accelerator."""
    source = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))
    torch.save(source.state_dict(), tmp_path / "file")
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))
    with ExitStack() as closing:
        files = CheckpointFiles(tmp_path / "file", closing)
        names = {*module.state_dict()}
        content = open_content(
            files, adapt.compose(), module, with_optimizer=False, assign=None, weights_only=True, mmap=None
        )
        load = plan_load(module, content, strict=True, assign=None, display_name="file")
        with FakeTensorMode(allow_non_fake_inputs=True):
            prepared = prepare_load(load, lambda: DEVICE, may_share=True)
            assert {copy.destination.device for copy in prepared.copies} == {DEVICE}
            assert len(prepared.copies) == len(names) and prepared.bytes_mapped == 0
            prepared.finish()
    assert {tensor.device for tensor in module.state_dict().values()} == {DEVICE}


# --- a real accelerator -----------------------------------------------------------------------------------------------

on_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")


def accelerator() -> torch.device:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return torch.device(device.type, torch.accelerator.current_device_index())


@pytest.mark.gpu
@on_accelerator
@pytest.mark.parametrize("on_meta", [False, True])
def test_into_a_module_on_a_real_accelerator(tmp_path: Path, on_meta: bool) -> None:
    source = nn.Sequential(nn.Linear(3000, 2000), nn.BatchNorm1d(2000))
    torch.save(source.state_dict(), tmp_path / "file")
    with torch.device("meta" if on_meta else accelerator()):
        module = nn.Sequential(nn.Linear(3000, 2000), nn.BatchNorm1d(2000))
    report = dist_load_into(module, tmp_path / "file")
    assert report.delivery == "read"
    for name, tensor in module.state_dict().items():
        assert tensor.device == accelerator()
        assert torch.equal(source.state_dict()[name], tensor.cpu()), name


@pytest.mark.gpu
@on_accelerator
def test_odd_tensors_on_a_real_accelerator(tmp_path: Path) -> None:
    content = odd_tensors()
    destinations = odd_destinations(content, accelerator())
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", content, closing)
        read_all(
            [TensorCopy(saved[name], into, whole(tuple(into.shape))) for name, into in destinations.items()],
            lambda done: None,
            LIMITS,
        )
    for name, destination in destinations.items():
        assert torch.equal(destination.cpu(), content[name].to(destination.dtype)), name


@pytest.mark.gpu
@on_accelerator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_own_rows_and_columns_on_a_real_accelerator(tmp_path: Path, dtype: torch.dtype) -> None:
    content = torch.randn(4000, 6000).to(torch.bfloat16)
    regions = [Region((1000, 0), (1000, 6000)), Region((0, 1500), (4000, 3000)), Region((3, 5), (11, 13))]
    destinations = [torch.zeros(region.shape, dtype=dtype, device=accelerator()) for region in regions]
    with ExitStack() as closing:
        saved = saved_tensors(tmp_path / "file", {"x": content}, closing)["x"]
        read_all(
            [TensorCopy(saved, *pair) for pair in zip(destinations, regions, strict=True)], lambda done: None, LIMITS
        )
    for region, destination in zip(regions, destinations, strict=True):
        rows, columns = (slice(at, at + size) for at, size in zip(region.offset, region.shape, strict=True))
        assert torch.equal(destination.cpu(), content[rows, columns].to(dtype))


@pytest.mark.gpu
@on_accelerator
@pytest.mark.parametrize("module_dtype", [torch.bfloat16, torch.float32])
def test_a_real_accelerator_holds_its_tensors_and_two_buckets(tmp_path: Path, module_dtype: torch.dtype) -> None:
    torch.save(
        {f"{number}.weight": torch.ones(2048, 4096, dtype=torch.bfloat16) for number in range(8)}, tmp_path / "x"
    )
    device = accelerator()
    with torch.device(device):
        module = nn.Sequential(*(nn.Linear(4096, 2048, bias=False, dtype=module_dtype) for _ in range(8)))
    memory = torch.get_device_module(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    dist_load_into(module, tmp_path / "x")
    assert memory.max_memory_allocated(device) - before <= 2 * pinned.BUFFER_BYTES
    assert all(torch.equal(linear.weight, torch.ones_like(linear.weight)) for linear in module)
