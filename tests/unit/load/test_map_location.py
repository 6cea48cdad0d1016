"""Every form of map_location through the real torch.load, on files saved on devices that are not here."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import rankload
from rankload._load.device import devices
from rankload._load.device.devices import Accelerator, resolve_map_location
from rankload._types import Identity
from rankload.errors import ArgumentError, DeviceError

has_accelerator = torch.accelerator.is_available()
needs_accelerator = pytest.mark.skipif(not has_accelerator, reason="no accelerator")
without_accelerator = pytest.mark.skipif(has_accelerator, reason="there is an accelerator")

SINGLE = Identity(0, 1, 0, 1, 0, "node7", "single")
RANK_5 = Identity(5, 8, 1, 4, 1, "node7", "torchrun")
WITHOUT_LOCAL_RANK = Identity(5, 8, None, None, None, "node7", "pmi")

WEIGHTS = {"cpu": torch.arange(4.0), "cuda:0": torch.arange(5.0), "cuda:1": torch.arange(6.0)}


def save(path, *tags, **torch_save_arguments):
    """Save the tensors of some tags as if each had been on the device that its tag names."""
    tag_of_size = {WEIGHTS[tag].untyped_storage().nbytes(): tag for tag in WEIGHTS}
    with mock.patch("torch.serialization.location_tag", lambda storage: tag_of_size[storage.nbytes()]):
        torch.save({tag: WEIGHTS[tag] for tag in tags}, path, **torch_save_arguments)
    return path


@pytest.fixture(params=["zip", "zip mapped", "legacy"])
def load(request, tmp_path):
    """Save tensors with the given tags and load them with a map_location resolved for the rank."""

    def save_and_load(map_location, identity, *tags):
        path = save(tmp_path / "x.pth", *tags, _use_new_zipfile_serialization=request.param != "legacy")
        resolved = resolve_map_location(map_location, identity)
        return torch.load(path, resolved, weights_only=True, mmap=request.param == "zip mapped")

    return save_and_load


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(devices, "visible_accelerator", lambda: Accelerator("cuda", 8, 0, False))


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(devices, "visible_accelerator", lambda: Accelerator("cuda", 1, 0, False))


@pytest.fixture
def own_device_is_meta(monkeypatch):
    """Make "meta" the rank's own device: a device that exists anywhere and is not the CPU."""
    asked = []
    monkeypatch.setattr(devices, "own_device", lambda *a: asked.append(a) or torch.device("meta"))
    return asked


def devices_of(state_dict):
    return {name: str(tensor.device) for name, tensor in state_dict.items()}


def assert_equal_weights(state_dict):
    for name, tensor in state_dict.items():
        assert torch.equal(tensor, WEIGHTS[name])


def test_the_files_are_what_they_pretend_to_be(tmp_path):
    if has_accelerator:
        pytest.skip("torch restores them where there is an accelerator")
    path = save(tmp_path / "x.pth", "cpu", "cuda:1")
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        torch.load(path, weights_only=True)


@without_accelerator
@pytest.mark.parametrize("identity", [SINGLE, RANK_5, WITHOUT_LOCAL_RANK], ids=["single", "job", "no local rank"])
def test_none_without_accelerator_is_the_cpu(load, identity):
    state_dict = load(None, identity, "cpu", "cuda:0", "cuda:1")
    assert set(devices_of(state_dict).values()) == {"cpu"}
    assert_equal_weights(state_dict)


@pytest.mark.parametrize("identity", [SINGLE, RANK_5], ids=["single", "job"])
def test_none_puts_on_the_own_device_what_was_on_an_accelerator(load, own_device_is_meta, monkeypatch, identity):
    monkeypatch.setattr(devices, "_exists", lambda kind, tag: False)
    state_dict = load(None, identity, "cpu", "cuda:0", "cuda:1")
    assert devices_of(state_dict) == {"cpu": "cpu", "cuda:0": "meta", "cuda:1": "meta"}
    assert len(own_device_is_meta) == 1


def test_none_in_a_job_ignores_that_the_tagged_device_exists(load, own_device_is_meta, monkeypatch):
    monkeypatch.setattr(devices, "_exists", lambda kind, tag: True)
    assert devices_of(load(None, RANK_5, "cuda:0", "cuda:1")) == {"cuda:0": "meta", "cuda:1": "meta"}


def test_none_for_a_group_of_one_rank_in_a_job_is_as_in_the_job(load, own_device_is_meta, monkeypatch):
    monkeypatch.setattr(devices, "_exists", lambda kind, tag: True)
    alone = Identity(0, 1, 1, 4, 1, "node7", "torchrun")
    assert devices_of(load(None, alone, "cuda:0")) == {"cuda:0": "meta"}


def test_none_for_a_lone_call_of_a_rank_without_launcher_is_as_in_the_job(load, own_device_is_meta, monkeypatch):
    monkeypatch.setattr(devices, "_exists", lambda kind, tag: True)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert devices_of(load(None, SINGLE, "cuda:0")) == {"cuda:0": "meta"}
    finally:
        dist.destroy_process_group()


@without_accelerator
def test_none_in_a_single_process_means_what_torch_means_where_the_device_exists(load, own_device_is_meta, monkeypatch):
    monkeypatch.setattr(devices, "_exists", lambda kind, tag: tag == "cuda:1")
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):  # torch's, for it is not here
        load(None, SINGLE, "cuda:1")
    assert not own_device_is_meta


def test_none_does_not_look_for_a_device_when_all_was_on_the_cpu(load, own_device_is_meta):
    assert devices_of(load(None, RANK_5, "cpu")) == {"cpu": "cpu"}
    assert not own_device_is_meta


def test_none_with_an_unknown_own_device_fails_only_when_one_is_needed(load, eight_devices):
    assert_equal_weights(load(None, WITHOUT_LOCAL_RANK, "cpu"))
    with pytest.raises(DeviceError, match="pmi sets no local rank"):
        load(None, WITHOUT_LOCAL_RANK, "cpu", "cuda:1")


@pytest.mark.parametrize(
    "tag", ["cuda", "cuda:3", "cuda3", "xpu:0", "mps", "hpu:1", "npu:7", "mtia:0", "privateuseone:0"]
)
def test_tags_of_accelerators(tag):
    assert devices._accelerator_of(tag) is not None


@pytest.mark.parametrize("tag", ["cpu", "meta", "remote:0", "https://host/x", ""])
def test_tags_that_torch_restores_itself(tag):
    assert devices._accelerator_of(tag) is None


def test_tags_of_registered_packages_are_left_to_them(tmp_path):
    registry = list(torch.serialization._package_registry)
    # a priority of its own: torch sorts the entries, and cannot compare two functions
    torch.serialization.register_package(
        3, lambda storage: "vault:0", lambda storage, tag: storage if tag == "vault:0" else None
    )
    try:
        torch.save(WEIGHTS, tmp_path / "x.pth")
        state_dict = torch.load(tmp_path / "x.pth", resolve_map_location(None, RANK_5), weights_only=True)
    finally:
        torch.serialization._package_registry[:] = registry
    assert_equal_weights(state_dict)


@pytest.mark.parametrize(
    "form",
    [
        "cpu",
        torch.device("cpu"),
        {"cuda:0": "cpu", "cuda:1": "cpu"},
        {"cuda:0": torch.device("cpu"), "cuda:1": torch.device("cpu")},
        lambda storage, tag: storage,
    ],
    ids=["str", "device", "dict of str", "dict of device", "callable"],
)
@pytest.mark.parametrize("identity", [SINGLE, RANK_5], ids=["single", "job"])
def test_torch_forms_mean_what_they_mean_to_torch(load, own_device_is_meta, form, identity):
    state_dict = load(form, identity, "cpu", "cuda:0", "cuda:1")
    assert set(devices_of(state_dict).values()) == {"cpu"}
    assert_equal_weights(state_dict)
    assert not own_device_is_meta


@pytest.mark.parametrize("form", ["meta", torch.device("meta"), {"cuda:0": "meta", "cpu": "meta"}])
def test_other_targets_than_the_cpu(load, form):
    assert devices_of(load(form, RANK_5, "cpu", "cuda:0")) == {"cpu": "meta", "cuda:0": "meta"}


def test_a_callable_may_leave_the_choice_to_torch(load):
    assert_equal_weights(load(lambda storage, tag: None, RANK_5, "cpu"))


@without_accelerator
@pytest.mark.parametrize("identity", [SINGLE, RANK_5], ids=["single", "job"])
def test_a_dict_that_misses_a_tag_is_as_in_torch(load, identity):
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        load({"cuda:0": "cpu"}, identity, "cuda:0", "cuda:1")


@pytest.mark.parametrize("form", ["{device}", {"cuda:0": "{device}", "cuda:1": "{device}", "cpu": "{device}"}])
def test_device_template(load, own_device_is_meta, form):
    state_dict = load(form, RANK_5, "cpu", "cuda:0", "cuda:1")
    assert set(devices_of(state_dict).values()) == {"meta"}


@without_accelerator
def test_device_template_without_accelerator_is_the_cpu(load):
    assert_equal_weights(load("{device}", RANK_5, "cpu", "cuda:1"))


def test_templates_are_filled_for_each_rank(eight_devices):
    assert resolve_map_location("cuda:{local_rank}", RANK_5) == "cuda:1"
    assert resolve_map_location("cuda:{rank}", RANK_5) == "cuda:5"
    assert resolve_map_location("{device}", RANK_5) == "cuda:1"
    assert resolve_map_location({"cuda:0": "cuda:{local_rank}", "cuda:1": "cpu"}, RANK_5) == {
        "cuda:0": "cuda:1",
        "cuda:1": "cpu",
    }


@without_accelerator
def test_a_filled_template_is_a_device(load):
    with pytest.raises(DeviceError, match="'cuda:1': this process has no cuda device"):
        load("cuda:{local_rank}", RANK_5, "cuda:0")


@pytest.mark.parametrize(
    "template",
    ["cuda:{localrank}", "cuda:{}", "cuda:{0}", "cuda:{rank!r}", "cuda:{rank:02}", "{{device}}", "cuda:{rank"],
)
@pytest.mark.parametrize("wrap", [str, lambda template: {"cuda:0": template}], ids=["str", "dict"])
def test_unknown_placeholders_are_named_beside_the_known(template, wrap):
    with pytest.raises(ArgumentError) as caught:
        resolve_map_location(wrap(template), RANK_5)
    assert repr(template) in str(caught.value)
    assert "{device}, {local_rank}, {rank}" in str(caught.value)


def test_a_local_rank_that_nobody_told_is_explained(eight_devices):
    with pytest.raises(DeviceError, match=r"pmi sets no local rank for rank 5 on node7\. Set LOCAL_RANK"):
        resolve_map_location("cuda:{local_rank}", WITHOUT_LOCAL_RANK)
    assert resolve_map_location("cuda:{rank}", WITHOUT_LOCAL_RANK) == "cuda:5"


@pytest.mark.parametrize("form", ["cuda:{local_rank}", {"cuda:0": "cuda:{local_rank}"}])
def test_a_local_rank_is_no_device_where_each_task_sees_its_own(one_device, form):
    with pytest.raises(DeviceError) as caught:
        resolve_map_location(form, RANK_5)
    message = str(caught.value)
    assert "'cuda:{local_rank}' gives cuda:1 for rank 5 on node7" in message
    assert "1 cuda device" in message
    assert '"{device}"' in message
    assert resolve_map_location("{device}", RANK_5) == "cuda:0"


@pytest.mark.gpu
@needs_accelerator
def test_on_an_accelerator_none_maps_a_missing_device_to_the_own(load):
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda" or torch.accelerator.device_count() != 1:
        pytest.skip("needs exactly one CUDA device")
    for identity in (SINGLE, RANK_5):
        state_dict = load(None, identity, "cpu", "cuda:0", "cuda:1")
        assert devices_of(state_dict) == {"cpu": "cpu", "cuda:0": "cuda:0", "cuda:1": "cuda:0"}
        assert_equal_weights({name: tensor.cpu() for name, tensor in state_dict.items()})


@pytest.mark.gpu
@needs_accelerator
@pytest.mark.parametrize("form", ["None", "'cpu'", "{'cpu': 'cpu'}", "lambda storage, tag: storage"])
def test_no_accelerator_is_initialised_for_cpu_targets(tmp_path, form):
    path = save(tmp_path / "x.pth", "cpu")
    script = f"""
import torch
from rankload._load.device.devices import own_device, resolve_map_location
from rankload._types import Identity
identity = Identity(0, 2, 0, 2, 0, "here", "torchrun")
own_device(identity)
torch.load({str(path)!r}, resolve_map_location({form}, identity), weights_only=True, mmap=True)
print(torch.get_device_module(torch.accelerator.current_accelerator()).is_initialized())
"""
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "False"


# --- a device that this process does not have -------------------------------------------------------------------------

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this process has the device")


@WITHOUT_CUDA
@pytest.mark.parametrize(
    "place", ["cuda", "cuda:1", torch.device("cuda"), {"cpu": "cuda"}, {"cpu": torch.device("cuda", 0)}], ids=str
)
@pytest.mark.parametrize("way", [rankload.load, rankload.dist_load_state_dict_from_url])
def test_an_absent_device_is_not_the_files_fault(tmp_path: Path, way: Any, place: Any) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(rankload.errors.DeviceError, match=r"(?i)cuda device.*cpu") as caught:
        way(str(tmp_path / "x.pth"), map_location=place)
    assert isinstance(caught.value, RuntimeError) and "could not load" not in str(caught.value)


@WITHOUT_CUDA
def test_fake_tensors_need_no_device(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth")
    with FakeTensorMode():
        assert rankload.load(tmp_path / "x.pth", "cuda")["w"].device.type == "cuda"
