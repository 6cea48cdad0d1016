"""The rule that gives each rank its own device."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from rankload._load.device.devices import Accelerator, choose_device, own_device, visible_accelerator
from rankload._types import Identity
from rankload.errors import DeviceError

has_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")


def rank(local_rank=None, world_size=8):
    return Identity(5, world_size, local_rank, None, None, "node7", "torchrun")


def cuda(count, current=None):
    return Accelerator("cuda", count, current or 0, current is not None)


@pytest.mark.parametrize(
    ("accelerator", "local_rank", "bound", "expected"),
    [
        # no accelerator
        (None, 3, None, "cpu"),
        (None, None, None, "cpu"),
        # bound by the process group: before everything else
        (cuda(8, current=2), 3, "cuda:5", "cuda:5"),
        (None, 3, "cuda:5", "cuda:5"),
        # the script has selected a device
        (cuda(8, current=2), 3, None, "cuda:2"),
        (cuda(8, current=2), None, None, "cuda:2"),
        # device 0 is current before anybody selects one
        (cuda(8, current=0), 3, None, "cuda:3"),
        # one visible device: srun --gpus-per-task
        pytest.param(cuda(1), 5, None, "cuda:0", marks=pytest.mark.fault(51)),
        pytest.param(cuda(1, current=0), 5, None, "cuda:0", marks=pytest.mark.fault(51)),
        (cuda(1), None, None, "cuda:0"),
        # local rank
        (cuda(8), 0, None, "cuda:0"),
        (cuda(8), 7, None, "cuda:7"),
        # other accelerators
        (Accelerator("xpu", 12, 0, False), 11, None, "xpu:11"),
        (Accelerator("mps", 1, 0, False), 0, None, "mps:0"),
    ],
)
def test_rule(accelerator, local_rank, bound, expected):
    bound = None if bound is None else torch.device(bound)
    assert choose_device(accelerator, rank(local_rank), bound) == torch.device(expected)


@pytest.mark.parametrize("current", [None, 0])
def test_more_ranks_than_devices_is_explained(current):
    with pytest.raises(DeviceError) as caught:
        choose_device(cuda(4, current), rank(local_rank=4))
    message = str(caught.value)
    assert "rank 5 on node7" in message
    assert "4 cuda devices" in message
    assert "local rank 4" in message
    assert "device_id=" in message
    assert 'map_location="cpu"' in message
    assert (caught.value.count, caught.value.local_rank) == (4, 4)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_unknown_local_rank_among_several_devices_is_explained():
    with pytest.raises(DeviceError, match=r"torchrun sets no local rank\. Set LOCAL_RANK"):
        choose_device(cuda(4), rank(local_rank=None))


def test_the_visible_devices_are_in_the_message(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(DeviceError, match=r"2 cuda devices \(CUDA_VISIBLE_DEVICES=2,3\)"):
        choose_device(cuda(2), rank(local_rank=2))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_process_group_tells_what_it_is_bound_to(group):
    bound = torch.device("cuda:3")
    group.bound_device_id = bound  # what init_process_group(device_id=) does where there is such a device
    assert own_device(rank(5)) == bound
    assert own_device(rank(5), group) == bound


def test_a_subgroup_that_is_not_bound_follows_the_default_group(group):
    subgroup = dist.new_group([0])
    group.bound_device_id = torch.device("cuda:3")
    assert subgroup.bound_device_id is None
    assert own_device(rank(5), subgroup) == torch.device("cuda:3")


def test_the_local_rank_is_unknown_to_ranks_without_launcher(monkeypatch):
    monkeypatch.setattr("rankload._load.device.devices.visible_accelerator", lambda: cuda(8))
    with pytest.raises(DeviceError):
        own_device(rank(local_rank=None))


def test_but_the_first_rank_of_a_job_is_the_first_on_its_node(monkeypatch, group):
    monkeypatch.setattr("rankload._load.device.devices.visible_accelerator", lambda: cuda(8))
    assert own_device(rank(local_rank=None)) == torch.device("cuda:0")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_accelerator_the_own_device_is_the_cpu():
    assert visible_accelerator() is None
    assert own_device(rank(local_rank=None)) == torch.device("cpu")


@pytest.mark.gpu
@has_accelerator
def test_the_snapshot_is_what_torch_says():
    accelerator = visible_accelerator()
    assert accelerator.type == torch.accelerator.current_accelerator().type
    assert accelerator.count == torch.accelerator.device_count()


@pytest.mark.fault(51)
@pytest.mark.gpu
@has_accelerator
def test_one_visible_device_belongs_to_any_local_rank():
    script = """
import torch
from rankload._load.device.devices import own_device
from rankload._types import Identity
device = own_device(Identity(5, 8, 5, 8, 0, "here", "torchrun"))
module = torch.get_device_module(device)
print(device, module.is_initialized(), module.device_count())
"""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "ZE_AFFINITY_MASK": "0"}
    out = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120, env=environ
    )
    kind = torch.accelerator.current_accelerator().type
    assert out.stdout.split() == [f"{kind}:0", "False", "1"]
