"""What torch.load accepts no function for: TorchScript archives, wrapper subclasses, FakeTensorMode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import rankload
from harness import checkpoints
from rankload._load.device.devices import Placement
from rankload._load.device.map_location import location_of_script

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit and masked tensors warn of themselves

WAYS: dict[str, Callable[..., Any]] = {
    "load": rankload.load,
    "dist": rankload.dist_load_state_dict_from_url,
}
PLACES = [None, "cpu", torch.device("cpu"), "{device}", {"cuda:0": "cpu"}]


@pytest.mark.parametrize("map_location", PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_torchscript_archives(tmp_path: Path, way: str, map_location: Any) -> None:
    module = nn.Linear(2, 3)
    torch.jit.save(torch.jit.script(module), tmp_path / "script.pt")  # type: ignore[no-untyped-call]
    found = WAYS[way](str(tmp_path / "script.pt"), map_location=map_location, weights_only=False)
    assert isinstance(found, torch.jit.ScriptModule) and torch.equal(found.weight, module.weight)


def test_torchscript_archives_from_open_files(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "script.pt")  # type: ignore[no-untyped-call]
    with (tmp_path / "script.pt").open("rb") as file:
        assert isinstance(rankload.load(file, weights_only=False), torch.jit.ScriptModule)


def test_where_a_script_goes() -> None:
    """torch.jit.load moves all tensors to one device, or leaves each where it was."""
    second = Placement(lambda tag: torch.device("cuda", 1) if tag.startswith("cuda") else None)
    assert location_of_script(second, {"cpu"}) is None
    assert location_of_script(second, {"cuda:0"}) == "cuda:1"
    assert location_of_script(second, {"cuda:0", "cuda:1"}) == "cuda:1"
    assert location_of_script(Placement(lambda tag: torch.device("cpu")), {"cpu", "cuda:0"}) == "cpu"
    assert location_of_script({"cuda:0": "cpu"}, {"cuda:0"}) == "cpu"
    assert location_of_script("cuda:3", {"cpu"}) == "cuda:3"
    with pytest.raises(rankload.ArgumentError, match=r"cpu to cpu, cuda:0 to cuda:1.*map_location"):
        location_of_script(second, {"cpu", "cuda:0"})


SUBCLASSES: dict[str, Callable[[], Any]] = {
    "two": lambda: TwoTensor(torch.arange(3.0), torch.ones(3)),
    "masked": lambda: masked_tensor(torch.arange(3.0), torch.tensor([True, False, True])),
    "nested in one": lambda: TwoTensor(
        TwoTensor(torch.ones(2), torch.ones(2)), TwoTensor(torch.ones(2), torch.ones(2))
    ),
}


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("way", WAYS)
def test_wrapper_subclasses(tmp_path: Path, way: str, kind: str, is_legacy: bool) -> None:
    tensor = SUBCLASSES[kind]()
    torch.save({"w": tensor}, tmp_path / "file.pt", _use_new_zipfile_serialization=not is_legacy)
    found = WAYS[way](str(tmp_path / "file.pt"), weights_only=False)["w"]
    assert type(found) is type(tensor) and found.device == torch.device("cpu") and repr(found) == repr(tensor)


def test_a_wrapper_subclass_of_another_device_goes_to_this_ranks() -> None:
    """torch asks for its device apart from those of the storages within."""
    place = Placement(lambda tag: torch.device("cuda", 1) if tag.startswith("cuda") else None)
    assert place.get(torch.device("cuda", 0), None) == torch.device("cuda", 1)
    assert place.get("cuda:0", "cuda:0") == "cuda:1" and place.get("cpu", "cpu") == "cpu"
    assert place.get(torch.device("cpu"), torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("write", [checkpoints.write_zip, checkpoints.write_legacy])
@pytest.mark.parametrize("way", WAYS)
def test_under_a_mode_of_fake_tensors(tmp_path: Path, write: Any, way: str) -> None:
    file = write(tmp_path)
    with FakeTensorMode():
        expected = torch.load(file.path)
        found = WAYS[way](str(file.path))
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor)
        assert (found[name].device, found[name].shape, found[name].dtype) == (tensor.device, tensor.shape, tensor.dtype)


@pytest.mark.parametrize("way", WAYS)
def test_fake_tensors_of_another_device(tmp_path: Path, way: str) -> None:
    file = checkpoints.write_tagged(tmp_path, {"a": "cuda:0", "b": "cpu"})
    with FakeTensorMode():
        found = WAYS[way](str(file.path), map_location={"cuda:0": "cuda:1"})
    assert (found["a"].device, found["b"].device) == (torch.device("cuda", 1), torch.device("cpu"))
