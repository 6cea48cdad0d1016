"""Storages on accelerators that get their content late: simulated on the CPU, and on a real one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import OTHER, PLAIN, Odd

import rankload
from harness import checkpoints
from harness.checkpoints import CheckpointFile, assert_same
from rankload._load.device import pinned
from rankload._load.device.devices import Placement
from rankload._load.device.readers import Limits
from rankload._load.state_dict import deferred_storages as late_storages
from rankload._load.state_dict.read_checkpoint import read_checkpoint

FORMATS: dict[str, Callable[[Path, Any], CheckpointFile]] = {
    "zip": checkpoints.write_zip,
    "legacy": checkpoints.write_legacy,
    "legacy-zip": checkpoints.write_legacy_zip,
    "safetensors": checkpoints.write_safetensors,
}


def content() -> dict[str, torch.Tensor]:
    """Many small tensors, large ones, views of one another, other layouts."""
    torch.manual_seed(2)
    base = torch.randn(70, 90)
    return {
        **{f"small{number}": torch.randn(number + 1) for number in range(40)},
        "large": torch.randn(300, 50),
        "transposed": torch.randn(40, 60).t(),
        "base": base,
        "tied": base,
        "view": base[3:20],
        "half": torch.randn(999).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
    }


def without_ties(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the CPU for an accelerator; counts how many storages came late."""
    filled: list[int] = []
    fill = late_storages.DeferredStorages.fill

    def fill_and_count(self: Any, *arguments: Any) -> None:
        filled.append(sum(map(len, self._pairs.values())))
        fill(self, *arguments)

    monkeypatch.setattr(late_storages, "is_staged", lambda device: True)
    monkeypatch.setattr(late_storages.DeferredStorages, "fill", fill_and_count)
    for module in (pinned, late_storages):
        monkeypatch.setattr(module, "BUFFER_BYTES", 1000)
    return filled


@pytest.mark.parametrize("map_location", ["cpu", torch.device("cpu"), {"cpu": "cpu"}, "placement"])
def test_it_is_what_torch_load_makes(tmp_path: Path, late: list[int], map_location: Any) -> None:
    file = checkpoints.write_zip(tmp_path, content())
    place = Placement(lambda tag: torch.device("cpu")) if map_location == "placement" else map_location
    found = read_checkpoint(file.path, place, limits=Limits(3, 60))
    assert_same(found, torch.load(file.path))
    assert late[0] > 40
    assert found["tied"].data_ptr() == found["base"].data_ptr()
    assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["training", "safetensors"])
def test_other_content(tmp_path: Path, late: list[int], kind: str) -> None:
    if kind == "training":
        file = checkpoints.write_zip(tmp_path, checkpoints.training_checkpoint())
        expected = torch.load(file.path)
    else:
        expected = without_ties(content())
        file = checkpoints.write_safetensors(tmp_path, expected)
    found = read_checkpoint(file.path, "cpu")
    assert_same({**found}, {name: expected[name] for name in found})
    assert late[0] > 0


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_content_comes_late(tmp_path: Path, late: list[int], kind: str) -> None:
    torch.save(PLAIN[kind](), tmp_path / "file.pth")
    found, expected = read_checkpoint(tmp_path / "file.pth", "cpu"), torch.load(tmp_path / "file.pth")
    assert_same([found], [expected])
    assert (sum(late) > 0) == (b"storage" in pickle_of(tmp_path / "file.pth"))


@pytest.mark.parametrize("kind", OTHER)
def test_what_torch_load_makes_does_not(tmp_path: Path, late: list[int], kind: str) -> None:
    torch.save(OTHER[kind](), tmp_path / "file.pth")
    with torch.serialization.safe_globals([Odd]):
        found = read_checkpoint(tmp_path / "file.pth", "cpu")
        assert repr(found) == repr(torch.load(tmp_path / "file.pth"))
    assert not late


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read("file/data.pkl")


@pytest.mark.parametrize("kind", ["legacy", "legacy-zip"])
def test_what_cannot_be_mapped_does_not_come_late(tmp_path: Path, late: list[int], kind: str) -> None:
    file = FORMATS[kind](tmp_path, content())
    assert_same(read_checkpoint(file.path, "cpu"), content())
    assert not late or late == [0]


def test_a_callers_own_function_gets_the_content(tmp_path: Path, late: list[int]) -> None:
    file = checkpoints.write_zip(tmp_path, content())
    sums: list[int] = []

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        sums.append(sum(storage.tolist()))
        return storage

    assert_same(read_checkpoint(file.path, place), torch.load(file.path))
    assert not late and max(sums) > 0


def test_a_deserialiser_of_the_callers_own_gets_the_content(tmp_path: Path, late: list[int]) -> None:
    """torch.serialization.register_package, for a tag that is no device."""
    sums: list[int] = []

    def restore(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage | None:
        if tag != "vault:7":
            return None
        sums.append(sum(storage.tolist()))
        return storage

    registry = list(torch.serialization._package_registry)
    # a priority of its own: torch sorts the entries, and cannot compare two functions
    torch.serialization.register_package(4, lambda storage: None, restore)
    try:
        file = checkpoints.write_zip(tmp_path, content())
        found = read_checkpoint(file.path, "vault:7")
    finally:
        torch.serialization._package_registry[:] = registry
    assert_same(found, torch.load(file.path))
    assert late == [0] and len(sums) > 40 and max(sums) > 0


class Sum:
    """Looks at a tensor while it is loaded."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sum = self.tensor.sum().item()


def test_objects_that_look_into_tensors_find_them_filled(tmp_path: Path, late: list[int]) -> None:
    torch.save({"weight": torch.ones(5000), "object": Sum(torch.ones(7000))}, tmp_path / "file.pth")
    found = read_checkpoint(tmp_path / "file.pth", "cpu", weights_only=False)
    assert found["object"].sum == 7000 and found["weight"].sum() == 5000
    assert not late


@pytest.mark.parametrize("nested", [False, True])
def test_so_do_those_in_lists(tmp_path: Path, late: list[int], nested: bool) -> None:
    objects: Any = [Sum(torch.ones(7000)), Sum(torch.ones(3))]
    torch.save({"weight": torch.ones(5000), "objects": [objects] if nested else objects}, tmp_path / "file.pth")
    place = Placement(lambda tag: torch.device("cpu"))
    with torch.serialization.safe_globals([Sum]):
        found = read_checkpoint(tmp_path / "file.pth", place)
    assert (found["objects"][0] if nested else found["objects"])[0].sum == 7000
    assert not late


class Wrapper(torch.Tensor):
    """Has no storage of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        raise NotImplementedError


def test_what_torch_load_does_not_do_with_functions_is_left_to_it(tmp_path: Path, late: list[int]) -> None:
    torch.save({"wrapped": Wrapper(torch.ones(4)), "weight": torch.ones(5000)}, tmp_path / "file.pth")
    with torch.serialization.safe_globals([Wrapper]):
        found = read_checkpoint(tmp_path / "file.pth", "cpu")
    assert type(found["wrapped"]) is Wrapper and found["weight"].sum() == 5000
    assert not late


def test_sparse_tensors_are_checked_with_their_content(tmp_path: Path, late: list[int]) -> None:
    torch.save({"sparse": torch.eye(300).to_sparse(), "weight": torch.ones(5000)}, tmp_path / "file.pth")
    found = read_checkpoint(tmp_path / "file.pth", "cpu")
    assert torch.equal(found["sparse"].to_dense(), torch.eye(300)) and found["weight"].sum() == 5000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("kind", [*FORMATS])
@pytest.mark.parametrize("form", ["str", "device", "dict", "template", "tag"])
def test_on_a_real_accelerator(tmp_path: Path, kind: str, form: str) -> None:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = torch.device(accelerator.type, 0)
    expected = without_ties(content()) if kind == "safetensors" else content()
    # what is saved on the accelerator needs no map_location to come there
    saved = {name: tensor.to(device) for name, tensor in expected.items()} if form == "tag" else expected
    file = FORMATS[kind](tmp_path, saved)
    location: Any = {"str": str(device), "device": device, "dict": {"cpu": str(device)}, "template": "{device}"}.get(
        form
    )
    found = rankload.load(file.path, location)
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), name
        if form != "tag" or kind != "safetensors":  # which knows no devices
            assert found[name].device == device, name
    if kind == "zip" and form != "tag":
        assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()
