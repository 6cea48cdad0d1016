"""`dist_load_into` and tensors that are not written like others, because of what they are or how they were saved."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.testing._internal.two_tensor import TwoTensor

from harness.alike import assert_alike
from rankload import LoadError, adapt, dist_load_into, open_checkpoint
from rankload._load.module.slots import own_part


def saved(tmp_path: Path, content: Any, **keywords: Any) -> Path:
    torch.save(content, tmp_path / "checkpoint.pth", **keywords)
    return tmp_path / "checkpoint.pth"


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("x", buffer)
    return module


def quantised(scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.qint8)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, however it holds them."""
    if isinstance(tensor, TwoTensor):
        return torch.stack([tensor.a, tensor.b])
    return tensor.dequantize() if tensor.is_quantized else tensor.resolve_conj().resolve_neg()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
@pytest.mark.parametrize(
    ("make", "new"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex64).conj(), lambda: torch.tensor([1 + 2j, 3 + 4j])),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, lambda: torch.tensor([5.0, -6.0])),
        (lambda: torch.zeros(3, dtype=torch.bool), lambda: torch.tensor([1, 0, 2], dtype=torch.uint8)),
        (lambda: quantised(0.5), lambda: quantised(0.1)),
        (lambda: TwoTensor(torch.zeros(3), torch.zeros(3)), lambda: torch.ones(3)),
    ],
    ids=["conjugated", "negated", "mask", "quantised", "subclass"],
)
def test_buffers_of_other_kinds(
    tmp_path: Path, make: Callable[[], torch.Tensor], new: Callable[[], torch.Tensor]
) -> None:
    expected, module = with_buffer(make()), with_buffer(make())
    expected.load_state_dict({"x": new()})
    dist_load_into(module, saved(tmp_path, {"x": new()}))
    assert torch.equal(plain(module.x), plain(expected.x)) and plain(module.x).any()


def test_what_would_fail_midway_is_refused_before(tmp_path: Path) -> None:
    module = nn.Module()
    module.first = nn.Parameter(torch.zeros(4))
    module.register_buffer("x", torch.zeros(1).expand(4))
    with pytest.raises(LoadError, match=r"x: several of its elements share memory"):
        dist_load_into(module, saved(tmp_path, {"first": torch.ones(4), "x": torch.ones(4)}))
    with pytest.raises(LoadError, match=r"first: torch.int8 in the checkpoint cannot require a gradient, but .* does"):
        dist_load_into(
            module, saved(tmp_path, {"first": torch.ones(4, dtype=torch.int8), "x": torch.ones(4)}), assign=True
        )
    assert not module.first.any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_longest_elements_where_a_legacy_file_does_not_align_them(tmp_path: Path, device: str) -> None:
    """torch's kernels move 16 bytes at a time, and crash where those are not aligned."""
    for padding in range(64):
        content = {"x": torch.randn(40, 5, dtype=torch.complex128), "k" * padding: torch.ones(1)}
        path = saved(tmp_path, content, _use_new_zipfile_serialization=False)
        with open_checkpoint(path) as checkpoint:
            if checkpoint.entries["x"].offset % 16 == 8:
                break
    else:
        raise AssertionError("no such file")
    module = with_buffer(torch.zeros(40, 5, dtype=torch.complex128, device=device))
    dist_load_into(module, path, strict=False)
    assert module.x.data_ptr() % 16 == 0
    wide = torch.zeros(7, 9, dtype=torch.complex128).copy_(module.x[:1, :1].expand(7, 9))
    assert torch.equal(wide, content["x"][:1, :1].expand(7, 9)) and torch.equal(module.x, content["x"])


def test_a_part_that_is_converted_twice(tmp_path: Path) -> None:
    module = with_buffer(torch.zeros(3, dtype=torch.float64))
    dist_load_into(module, saved(tmp_path, {"x": torch.tensor([1.0, 2.0, 1 / 3])}), adapt=adapt.to_dtype(torch.float16))
    assert torch.equal(module.x, torch.tensor([1.0, 2.0, 1 / 3]).half().double())


class CopyingIntoData(nn.Module):
    """Loads by hand, into an alias of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.x.data.copy_(state_dict[f"{prefix}x"])


@pytest.mark.parametrize("assign", [None, True])
def test_modules_that_copy_into_an_alias(tmp_path: Path, assign: bool | None) -> None:
    module = CopyingIntoData()
    dist_load_into(module, saved(tmp_path, {"x": torch.ones(2)}), assign=assign)
    assert torch.equal(module.x.detach(), torch.ones(2))


def test_a_wrapped_module_with_a_child_called_module(tmp_path: Path) -> None:
    inner = nn.Module()
    inner.module = nn.Linear(3, 2)
    dist_load_into(
        nn.DataParallel(inner), saved(tmp_path, {"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)})
    )
    assert torch.equal(inner.module.weight.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
@pytest.mark.parametrize("is_saved_wrapped", [False, True])
def test_shapes_are_matched_within_wrappers(wrap: Any, is_saved_wrapped: bool) -> None:
    module = wrap(nn.Linear(3, 2))
    prefix = next(iter(module.state_dict())).removesuffix("weight") if is_saved_wrapped else ""
    content = {f"{prefix}weight": torch.ones(2, 3), f"{prefix}bias": torch.ones(5)}
    assert list(adapt.match_shapes(module)(content)) == [f"{prefix}weight"]


def test_a_closed_checkpoint_reads_no_other_file(tmp_path: Path) -> None:
    with open_checkpoint(saved(tmp_path, {"x": torch.ones(2)})) as checkpoint:
        assert torch.equal(checkpoint["x"], torch.ones(2))
    with pytest.raises(ValueError, match="'x' of a closed checkpoint"):
        checkpoint["x"]


def test_reports_travel(tmp_path: Path) -> None:
    report = dist_load_into(nn.Linear(3, 2), saved(tmp_path, nn.Linear(3, 2).state_dict()))
    arrived = pickle.loads(pickle.dumps(report))
    assert vars(arrived) == vars(report) and arrived == report and arrived.phases["fill"] > 0


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_an_optimizer_with_a_learning_rate_that_is_a_tensor(tmp_path: Path) -> None:
    source, module = nn.Linear(3, 2), nn.Linear(3, 2)
    content = {"model": source.state_dict(), "optimizer": None}
    content["optimizer"] = torch.optim.Adam(source.parameters(), lr=torch.tensor(0.25)).state_dict()
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.5))
    dist_load_into((module, optimizer), saved(tmp_path, content))
    rate = optimizer.param_groups[0]["lr"]
    assert type(rate) is torch.Tensor and rate == 0.25


def test_an_optimizer_with_lists_of_tensors(tmp_path: Path) -> None:
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(3, 2)
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=3)

        def closure() -> Any:
            optimizer.zero_grad()
            loss = (module(torch.ones(4, 3)) - torch.arange(2.0)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return module, optimizer

    (source, expected), (module, optimizer) = trained(), trained()
    path = saved(tmp_path, {"model": source.state_dict(), "optimizer": expected.state_dict()})
    dist_load_into((module, optimizer), path)
    own, other = optimizer.state_dict()["state"][0], expected.state_dict()["state"][0]
    assert own.keys() == other.keys() and len(own["old_dirs"]) == len(other["old_dirs"]) > 0
    assert all(map(torch.equal, own["old_dirs"], other["old_dirs"])) and torch.equal(own["d"], other["d"])


def test_groups_that_were_saved_by_name_in_another_order(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def made(*order: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(3, 2)
        decay = {"weight": 0.5, "bias": 0.0}
        groups = [{"params": [getattr(module, name)], "weight_decay": decay[name]} for name in order]
        return module, torch.optim.AdamW(groups)

    (source, source_optimizer), (module, optimizer) = made("weight", "bias"), made("bias", "weight")
    content = {"model": source.state_dict(), "optim": get_optimizer_state_dict(source, source_optimizer)}
    dist_load_into((module, optimizer), saved(tmp_path, content))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]
    with pytest.raises(LoadError, match=r"parameter groups of \[1, 1\] parameters, the optimizer's have \[2\]"):
        dist_load_into((module, torch.optim.AdamW(module.parameters())), tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("extra", [torch.bfloat16, {"a": [1, None]}], ids=str)
def test_what_else_is_in_an_optimizer(tmp_path: Path, extra: Any) -> None:
    source, module = nn.Linear(3, 2), nn.Linear(3, 2)
    state = torch.optim.SGD(source.parameters(), lr=0.1).state_dict()
    state["param_groups"][0]["extra"] = extra
    state["state"]["steps so far"] = 7
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    dist_load_into((module, optimizer), saved(tmp_path, {"model": source.state_dict(), "optimizer": state}))
    assert optimizer.param_groups[0]["extra"] == extra and optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.state["steps so far"] == 7


@pytest.mark.parametrize(
    "state",
    [
        lambda: TwoTensor(torch.ones(2, 3), torch.zeros(2, 3)),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
)
def test_state_that_only_torch_load_builds(tmp_path: Path, state: Any) -> None:
    """As optimizers have it that keep their state in 8 bits."""
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    content = optimizer.state_dict()
    content["kept"] = state()
    if not state().is_quantized:  # which torch itself does not load as a parameter's state
        content["state"][0]["more"] = state()
    torch.save({"model": module.state_dict(), "optimizer": content}, tmp_path / "file.pth")
    loaded: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: loaded.append(state_dict))
    dist_load_into((module, optimizer), tmp_path / "file.pth", weights_only=False)
    expected = torch.load(tmp_path / "file.pth", weights_only=False)["optimizer"]
    assert_alike(loaded[0], expected)


def test_state_of_no_parameter_is_not_given_to_another(tmp_path: Path) -> None:
    source, module = nn.Linear(3, 2), nn.Linear(3, 2)
    state = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9).state_dict()
    state["param_groups"][0]["params"] = [3, 5]
    state["state"] = {3: {"momentum_buffer": torch.ones(2, 3)}, 0: {"momentum_buffer": torch.full((2, 3), 7.0)}}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    dist_load_into((module, optimizer), saved(tmp_path, {"model": source.state_dict(), "optimizer": state}))
    assert torch.equal(optimizer.state[module.weight]["momentum_buffer"], torch.ones(2, 3))
    assert set(optimizer.state) == {module.weight}


def test_strided_shards_alone_are_refused() -> None:
    """As FSDP makes them over tensor parallelism: cut by one mesh dimension they are rows from several places."""
    from torch.distributed.tensor.placement_types import _StridedShard

    class Distributed(torch.Tensor):
        _local_tensor = torch.zeros(4)
        placements = (_StridedShard(0, split_factor=2),)

    with pytest.raises(ValueError, match="rows from several places"):
        own_part(torch.zeros(8).as_subclass(Distributed))


# --- lazy modules -----------------------------------------------------------------------------------------------------


def test_lazy_modules_are_uninitialised_again_where_something_does_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2)).state_dict())
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    weight = module[0].weight
    with pytest.raises(LoadError, match=r"size mismatch for 1\.weight"):
        dist_load_into(module, path)
    assert module[0].weight is weight and is_lazy(weight) and is_lazy(module[0].bias)
    assert module(torch.ones(1, 4)).shape == (1, 2), "it takes the shape of its input, as before"
