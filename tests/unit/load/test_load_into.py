"""`dist_load_into` in a single process: whatever load_state_dict(torch.load(…)) does, without the copy between."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from harness import checkpoints
from rankload import (
    ArgumentError,
    LoadError,
    LoadReport,
    adapt,
    dist_load_into,
    dist_load_state_dict_from_url,
    open_checkpoint,
)


class Net(nn.Module):
    """A bit of everything: matrices, a norm with counters, a persistent and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("table", torch.rand(3), persistent=False)


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight


def trained(module: nn.Module, seed: int = 1) -> nn.Module:
    """Gives every tensor another value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randint(1, 100, tensor.shape, generator=generator))
    return module


def saved(tmp_path: Path, content: Any, file_format: str = "zip") -> Path:
    path = tmp_path / f"checkpoint-{file_format}.pth"
    if file_format == "safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=file_format == "zip")
    return path


def assert_equal(module: nn.Module, expected: nn.Module | dict[str, Any]) -> None:
    own, other = module.state_dict(), expected if isinstance(expected, dict) else expected.state_dict()
    assert list(own) == list(other)
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


FORMATS = ["zip", "legacy", "safetensors"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_writes_into_the_tensors_that_are_there(tmp_path: Path, file_format: str) -> None:
    source, net = trained(Net()), Net()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in net.state_dict(keep_vars=True).items()}
    table = net.table.clone()
    report = dist_load_into(net, str(saved(tmp_path, source.state_dict(), file_format)))
    assert_equal(net, source)
    assert {name: (tensor, tensor.data_ptr()) for name, tensor in net.state_dict(keep_vars=True).items()} == before
    assert torch.equal(net.table, table)
    assert report.bytes_read == sum(tensor.nbytes for tensor in source.state_dict().values())


def test_report_is_what_load_state_dict_returns(tmp_path: Path) -> None:
    path = saved(tmp_path, {**trained(Net()).state_dict(), "extra": torch.ones(1), "epoch": 3})
    net = nn.Module()
    net.head, net.tail = nn.Linear(8, 5), nn.Linear(1, 1)
    report = dist_load_into(net, path, strict=False)
    expected = net.load_state_dict(torch.load(path), strict=False)
    missing, unexpected = report
    assert isinstance(report, LoadReport) and (missing, unexpected) == tuple(expected)
    assert report.missing_keys == ["tail.weight", "tail.bias"] and report.unexpected_keys[-2:] == ["extra", "epoch"]
    assert report.path == path and report.delivery == "read"
    assert report.phases.keys() == {"fetch", "check", "fill"} and min(report.phases.values()) > 0
    assert "tail.weight" in repr(report)


# --- dtypes, layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)],
)
def test_converts_into_the_parameters_dtype(
    tmp_path: Path, file_format: str, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    weights = {"weight": torch.randn(40, 30, dtype=dtype), "bias": torch.randn(40, dtype=dtype)}
    linear = nn.Linear(30, 40, dtype=target_dtype)
    dist_load_into(linear, saved(tmp_path, weights, file_format))
    assert_equal(linear, {name: tensor.to(target_dtype) for name, tensor in weights.items()})


def test_saved_views_and_odd_layouts(tmp_path: Path) -> None:
    big = torch.randn(50, 60)
    content = {"a": big.t(), "b": big[3:20, 5:9], "c": big[7], "d": torch.randn(6, 1).expand(6, 4), "e": torch.zeros(0)}
    module = nn.ParameterDict({name: torch.zeros(tensor.shape) for name, tensor in content.items()})
    module["c"] = nn.Parameter(torch.zeros(2, 60)[0])
    module["a"] = nn.Parameter(torch.zeros(50, 60).t())
    dist_load_into(module, saved(tmp_path, content))
    assert_equal(module, content)


@pytest.mark.parametrize("file_format", ["zip", "legacy"])
def test_views_that_conjugate_or_negate(tmp_path: Path, file_format: str) -> None:
    """The file holds what they are views of, and a mark."""
    content = {"a": torch.randn(5, dtype=torch.complex64).conj(), "b": torch._neg_view(torch.randn(5))}  # type: ignore[attr-defined]
    module = nn.ParameterDict({name: torch.zeros_like(tensor) for name, tensor in content.items()})
    path = saved(tmp_path, content, file_format)
    dist_load_into(module, path)
    assert_equal(module, content)
    with open_checkpoint(path) as checkpoint:
        assert not list(checkpoint) and set(checkpoint.remainder) == {"a", "b"}


@pytest.mark.parametrize("content_dtype", [torch.float32, torch.float64], ids=["read", "converted"])
def test_a_backward_that_needs_the_old_values_fails(tmp_path: Path, content_dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2)
    loss = module(torch.ones(1, 3, requires_grad=True)).sum()
    dist_load_into(module, saved(tmp_path, nn.Linear(3, 2, dtype=content_dtype).state_dict()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    module(torch.ones(1, 3)).sum().backward()


def test_tensors_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        module = nn.Linear(3, 2)
    source = trained(nn.Linear(3, 2))
    dist_load_into(module, saved(tmp_path, source.state_dict()))
    assert_equal(module, source)


def test_channels_last_parameters_stay_so(tmp_path: Path) -> None:
    source = trained(nn.Conv2d(4, 8, 3))
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    dist_load_into(conv, saved(tmp_path, source.state_dict()))
    assert_equal(conv, source)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_zero_dimensional_parameters_take_one_element_of_old_files(tmp_path: Path) -> None:
    module = nn.ParameterDict({"scale": torch.zeros(())})
    dist_load_into(module, saved(tmp_path, {"scale": torch.tensor([2.5])}))
    assert module["scale"].item() == 2.5


# --- wrappers, ties, meta, assign -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
@pytest.mark.parametrize("is_saved_wrapped", [False, True])
def test_wrapped_modules(tmp_path: Path, wrapper: Any, is_saved_wrapped: bool) -> None:
    source, net = trained(Net()), Net()
    saved_module = wrapper(source) if is_saved_wrapped else source
    dist_load_into(wrapper(net), saved(tmp_path, saved_module.state_dict()))
    assert_equal(net, source)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("names", [["embedding.weight"], ["head.weight"], ["embedding.weight", "head.weight"]])
def test_tied_parameters_need_one_of_their_names_and_stay_tied(tmp_path: Path, device: str, names: list[str]) -> None:
    weight = torch.randn(7, 3)
    with torch.device(device):
        tied = Tied()
    report = dist_load_into(tied, saved(tmp_path, dict.fromkeys(names, weight)))
    assert tied.head.weight is tied.embedding.weight and torch.equal(tied.head.weight, weight)
    assert report.missing_keys == [] and report.bytes_read == weight.nbytes


@pytest.mark.parametrize("file_format", FORMATS)
def test_meta_modules_are_materialised_without_a_copy(tmp_path: Path, file_format: str) -> None:
    source = trained(Net())
    path = saved(tmp_path, source.state_dict(), file_format)
    with torch.device("meta"):
        net = Net()
    report = dist_load_into(net, path)
    assert_equal(net, source)
    assert {type(parameter) for parameter in net.parameters()} == {nn.Parameter}
    assert report.left_on_meta == ("table",) and net.table.is_meta
    if file_format != "legacy":  # whose tensors may not be aligned
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:rankload" in line]
        bounds = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
        assert any(begin <= net.head.weight.data_ptr() < end for begin, end in bounds)
    net.head.weight.data.zero_()  # a private mapping: the memory stays as it is
    dist_load_into(net, path)
    assert_equal(net, source)


def test_meta_modules_keep_their_dtype(tmp_path: Path) -> None:
    source = trained(nn.Linear(3, 4))
    linear = nn.Linear(3, 4, device="meta", dtype=torch.bfloat16)
    dist_load_into(linear, saved(tmp_path, source.state_dict()))
    assert_equal(linear, source.bfloat16())


def test_missing_tensors_stay_on_meta(tmp_path: Path) -> None:
    linear = nn.Linear(3, 4, device="meta")
    report = dist_load_into(linear, saved(tmp_path, {"weight": torch.ones(4, 3)}), strict=False)
    assert report.missing_keys == ["bias"] and linear.bias.is_meta and not linear.weight.is_meta


@pytest.mark.parametrize("mmap", [None, False, True])
def test_assign_takes_the_checkpoints_tensors(tmp_path: Path, mmap: bool | None) -> None:
    source = trained(nn.Linear(3, 4, dtype=torch.float64))
    linear = nn.Linear(3, 4)
    linear.bias.requires_grad_(False)
    weight = linear.weight
    path = saved(tmp_path, source.state_dict())
    dist_load_into(linear, path, assign=True, mmap=mmap)
    assert_equal(linear, source)
    assert linear.weight is not weight and linear.weight.requires_grad and not linear.bias.requires_grad
    maps = Path("/proc/self/maps").read_text()
    assert (str(path) in maps) == (mmap is True)
    assert mmap is not None or "memfd:rankload" in maps


# --- what a module does by itself -------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [torch.arange(3), {"a": [1, 2]}, io.BytesIO(b"\x01\x02")])
def test_extra_state(tmp_path: Path, extra: Any) -> None:
    source, module = WithExtraState(), WithExtraState()
    source.extra = extra
    dist_load_into(module, saved(tmp_path, source.state_dict()), weights_only=not isinstance(extra, io.BytesIO))
    if isinstance(extra, io.BytesIO):
        assert module.extra.getvalue() == b"\x01\x02"  # an object that only torch.load builds
    else:
        assert torch.equal(module.extra, extra) if isinstance(extra, torch.Tensor) else module.extra == extra
    assert torch.equal(module.weight, source.weight)


class Renamed(nn.Linear):
    """A module that has changed since version 1, as its own hook knows."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = -state_dict.pop(f"{prefix}matrix")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("version", [1, 2])
def test_module_versions_and_hooks_that_compute(tmp_path: Path, version: int) -> None:
    weight, bias = torch.randn(2, 3), torch.randn(2)
    content = OrderedDict({"0.weight" if version == 2 else "0.matrix": weight, "0.bias": bias})
    content._metadata = OrderedDict({"": {"version": 1}, "0": {"version": version}})  # type: ignore[attr-defined]
    module = nn.Sequential(Renamed(3, 2))
    dist_load_into(module, saved(tmp_path, content))
    assert_equal(module, {"0.weight": weight if version == 2 else -weight, "0.bias": bias})


class Joined(nn.Module):
    """Took its two matrices for one once, and joins them when it is loaded, as torch functions do."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.zeros(6, 4))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        joined = torch.cat([state_dict.pop(f"{prefix}first"), state_dict.pop(f"{prefix}second")], dim=0)
        state_dict[f"{prefix}both"] = torch.add(joined, other=state_dict.pop(f"{prefix}bias"))
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("file_format", FORMATS)
def test_hooks_that_call_torchs_functions(tmp_path: Path, file_format: str) -> None:
    content = {"first": torch.randn(2, 4), "second": torch.randn(4, 4), "bias": torch.randn(4)}
    module = Joined()
    dist_load_into(module, saved(tmp_path, content, file_format))
    assert torch.equal(module.both.detach(), torch.cat([content["first"], content["second"]]) + content["bias"])


def test_hooks_that_copy_the_state_dict(tmp_path: Path) -> None:
    source, net = trained(Net()), Net()

    def rewrite(state_dict: dict[str, Any], *_: Any) -> None:
        copied = copy.deepcopy(state_dict)
        state_dict.clear()
        state_dict.update(copied)

    net._register_load_state_dict_pre_hook(rewrite)
    dist_load_into(net, saved(tmp_path, source.state_dict()))
    assert_equal(net, source)


def test_weight_norm_takes_checkpoints_of_its_older_form(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = trained(nn.utils.weight_norm(nn.Linear(3, 4)))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    dist_load_into(new, saved(tmp_path, old.state_dict()))
    assert torch.equal(new.parametrizations.weight.original0, old.weight_g)
    assert torch.equal(new.parametrizations.weight.original1, old.weight_v)


def test_batch_norm_without_counters_of_old_files(tmp_path: Path) -> None:
    source = trained(nn.BatchNorm1d(4))
    content = dict(source.state_dict())
    del content["num_batches_tracked"]
    dist_load_into(norm := nn.BatchNorm1d(4), saved(tmp_path, content, "safetensors"))
    assert torch.equal(norm.running_var, source.running_var)


def test_swapping_tensors_as_torch_does_in_future(tmp_path: Path) -> None:
    source, net = trained(Net()), Net()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        dist_load_into(net, saved(tmp_path, source.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_equal(net, source)


def test_lazy_modules_take_the_checkpoints_shapes(tmp_path: Path) -> None:
    source, lazy = trained(nn.Linear(3, 2)), nn.LazyLinear(2)
    dist_load_into(lazy, saved(tmp_path, source.state_dict()))
    assert_equal(lazy, source)


# --- adapt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_to_dtype_converts_when_it_is_read(tmp_path: Path, dtype: torch.dtype, assign: bool) -> None:
    saved = nn.BatchNorm1d(3)
    saved(torch.randn(4, 3))
    torch.save(saved.state_dict(), path := tmp_path / "file")
    module = nn.BatchNorm1d(3, dtype=dtype)
    dist_load_into(module, path, adapt=adapt.to_dtype(torch.bfloat16), assign=assign)
    rounded = saved.running_mean.to(torch.bfloat16)
    assert torch.equal(module.running_mean, rounded.to(module.running_mean.dtype))
    assert module.running_mean.dtype == (torch.bfloat16 if assign else dtype)
    assert module.num_batches_tracked == 1 and module.num_batches_tracked.dtype == torch.int64


def test_to_dtype_then_a_sum_of_ones_own(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, path := tmp_path / "file")
    linear = nn.Linear(4, 3)
    dist_load_into(linear, path, adapt=[adapt.to_dtype(torch.bfloat16), lambda all: {n: t + 1 for n, t in all.items()}])
    assert (linear.weight == 2).all()


def test_adapters_work_on_the_index(tmp_path: Path) -> None:
    source = trained(Net())
    wrapped = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    path = saved(tmp_path, {"epoch": 1, "state_dict": {**wrapped, "module.old": torch.zeros(1000)}, "args": Path("x")})
    net = Net()
    steps = [adapt.unwrap(), adapt.strip_prefix("module."), adapt.drop("^old$"), adapt.match_shapes(net)]
    report = dist_load_into(net, path, adapt=steps)  # Path is what weights_only=True would refuse
    assert_equal(net, source)
    assert report.bytes_read == sum(tensor.nbytes for tensor in source.state_dict().values())


def test_a_whole_module_that_was_saved(tmp_path: Path) -> None:
    source, net = trained(Net()), Net()
    path = saved(tmp_path, {"model": source, "epoch": 3})
    with pytest.raises(LoadError, match="found no state dict"):
        dist_load_into(net, path, adapt=adapt.unwrap())
    dist_load_into(net, path, adapt=adapt.unwrap(), weights_only=False)
    assert_equal(net, source)


def test_functions_of_ones_own_get_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    linear = nn.Linear(3, 2)
    dist_load_into(linear, path, adapt=[lambda content: {name: 2 * tensor for name, tensor in content.items()}])
    assert_equal(linear, {"weight": torch.full((2, 3), 2.0), "bias": torch.full((2,), 2.0)})


# --- with an optimizer ------------------------------------------------------------------------------------------------


def stepped(
    module: nn.Module, kind: Any = torch.optim.AdamW, steps: int = 2, **arguments: Any
) -> torch.optim.Optimizer:
    """Trains a little, so that there is state."""
    head = [parameter for name, parameter in module.named_parameters() if name.startswith("head")]
    rest = [parameter for name, parameter in module.named_parameters() if not name.startswith("head")]
    optimizer = kind([{"params": head, "lr": 0.5}, {"params": rest}], lr=0.1, **arguments)
    for _ in range(steps):
        step(module, optimizer)
    return optimizer


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(parameter.square().sum() for parameter in module.parameters()).backward()
    optimizer.step()


def assert_same_state(optimizer: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    own, other = optimizer.state_dict(), expected.state_dict()
    assert own["param_groups"] == other["param_groups"] and own["state"].keys() == other["state"].keys()
    for number, values in own["state"].items():
        assert values.keys() == other["state"][number].keys()
        for key, value in values.items():
            torch.testing.assert_close(value, other["state"][number][key], rtol=0, atol=0, msg=f"{number} {key}")


@pytest.mark.parametrize(("kind", "arguments"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})])
@pytest.mark.parametrize("names", [("model", "optimizer"), ("state_dict", "optimizer_states")])
@pytest.mark.parametrize("mmap", [None, False])
def test_module_and_optimizer_go_on_where_they_were(
    tmp_path: Path, kind: Any, arguments: dict[str, Any], names: tuple[str, str], mmap: bool | None
) -> None:
    source = Net()
    source_optimizer = stepped(source, kind, **arguments)
    saved_optimizer = source_optimizer.state_dict()
    content = {names[0]: source.state_dict(), names[1]: [saved_optimizer] if names[1][-1] == "s" else saved_optimizer}
    path = saved(tmp_path, {**content, "epoch": 3})
    net = Net()
    optimizer = stepped(net, kind, steps=1, **arguments)
    report = dist_load_into((net, optimizer), path, mmap=mmap)
    assert_equal(net, source)
    assert_same_state(optimizer, source_optimizer)
    assert report.bytes_read > 2 * sum(parameter.nbytes for parameter in net.parameters()) or kind is torch.optim.SGD
    for module, its_optimizer in ((source, source_optimizer), (net, optimizer)):
        step(module, its_optimizer)
    assert_equal(net, source)


def test_optimizers_saved_by_name(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    source, net = Net(), Net()
    source_optimizer, optimizer = stepped(source), stepped(net, steps=0)
    content = {"model": source.state_dict(), "optim": get_optimizer_state_dict(source, source_optimizer)}
    dist_load_into((net, optimizer), saved(tmp_path, content))
    assert_same_state(optimizer, source_optimizer)


def test_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    source, net = Net(), Net()
    optimizer = torch.optim.AdamW(net.parameters())
    path = saved(tmp_path, {"model": source.state_dict(), "optimizer": stepped(source).state_dict()})
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(LoadError, match=r"parameter groups of \[2, 4\] parameters, the optimizer's have \[6\]"):
        dist_load_into((net, optimizer), path)
    with pytest.raises(LoadError, match="no optimizer state dict"):
        dist_load_into((net, optimizer), saved(tmp_path, {"model": source.state_dict()}))
    assert_equal(net, before)
    with pytest.raises(ArgumentError, match="would replace parameters"):
        dist_load_into((net, optimizer), path, assign=True)


# --- what does not fit ------------------------------------------------------------------------------------------------


def refused(module: nn.Module, path: Path, **arguments: Any) -> str:
    """Returns the message; nothing of the module has changed."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(LoadError) as caught:
        dist_load_into(module, path, **arguments)
    assert_equal(module, before)
    return str(caught.value)


def test_wrong_shapes_are_listed_before_anything_is_written(tmp_path: Path) -> None:
    content = trained(Net()).state_dict()
    content["head.weight"] = torch.zeros(6, 8)
    text = refused(Net(), saved(tmp_path, content), strict=False)
    assert "head.weight" in text and "[6, 8]" in text and "[5, 8]" in text and "1 do not fit" in text
    assert "adapt=adapt.match_shapes(module), strict=False" in text


def test_dtypes_that_would_lose_their_meaning(tmp_path: Path) -> None:
    content = {"weight": torch.zeros(2, 3, dtype=torch.complex64), "bias": torch.zeros(2)}
    text = refused(nn.Linear(3, 2), saved(tmp_path, content))
    assert "weight: torch.complex64 in the checkpoint cannot be converted to the module's torch.float32" in text


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "net.encoder."])
def test_prefixes_are_guessed(tmp_path: Path, prefix: str) -> None:
    content = trained(Net()).state_dict()
    longer = {f"{prefix}{name}": tensor for name, tensor in content.items()}
    assert f"adapt.strip_prefix({prefix!r})" in refused(Net(), saved(tmp_path, longer))


def test_a_missing_prefix_is_guessed(tmp_path: Path) -> None:
    module = nn.ModuleDict({"backbone": Net()})
    assert "adapt.add_prefix('backbone.')" in refused(module, saved(tmp_path, Net().state_dict()))


def test_a_wrapper_is_guessed(tmp_path: Path) -> None:
    text = refused(Net(), saved(tmp_path, {"model_ema": Net().state_dict(), "epoch": 3}))
    assert "adapt.unwrap('model_ema')" in text


def test_a_wrapper_and_a_prefix_are_guessed(tmp_path: Path) -> None:
    """What training scripts save of a DistributedDataParallel."""
    content = {"epoch": 3, "model": {f"module.{name}": tensor for name, tensor in Net().state_dict().items()}}
    path = saved(tmp_path, content)
    text = refused(Net(), path)
    assert "adapt=[adapt.unwrap('model'), adapt.strip_prefix('module.')]" in text
    dist_load_into(Net(), path, adapt=[adapt.unwrap("model"), adapt.strip_prefix("module.")])


def test_long_lists_are_cut(tmp_path: Path) -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(500)))
    text = refused(module, saved(tmp_path, {f"x{n}": torch.zeros(1) for n in range(500)}))
    assert "1000 missing" in text and "500 not in the module" in text and "and 980 more" in text
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), {0: torch.zeros(3)}])
def test_what_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    assert "holds no state dict" in refused(nn.Linear(3, 2), saved(tmp_path, content))


def test_what_is_no_module(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="expected a torch"):
        dist_load_into({}, saved(tmp_path, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [checkpoints.write_zip, checkpoints.write_legacy, checkpoints.write_safetensors])
def test_a_default_device_changes_nothing(tmp_path, write):
    """Within ``with torch.device("meta")``, where modules are made, what a load makes for itself stays on the CPU."""
    module = nn.Linear(30, 20)
    file = write(tmp_path, module.state_dict())
    with torch.device("meta"):
        made, other = nn.Linear(30, 20), nn.Linear(30, 20).to_empty(device="cpu")
        dist_load_into(made, file.path)
        dist_load_into(other, file.path, adapt=adapt.to_dtype(torch.float64))
        loaded = dist_load_state_dict_from_url(str(file.path), mmap=False)
        with open_checkpoint(file.path) as checkpoint:
            weight = checkpoint["weight"]
    for found in (made.weight, other.weight, loaded["weight"], weight):
        assert found.device.type == "cpu" and torch.equal(found, module.weight)


def test_checkpoint_that_contains_itself(tmp_path: Path) -> None:
    state_dict = nn.Linear(2, 3).state_dict()
    content: dict[str, Any] = {"model": state_dict, "list": [1]}
    content["self"] = content
    content["list"].append(content["list"])
    torch.save(content, tmp_path / "file.pth")
    dist_load_into(module := nn.Linear(2, 3), tmp_path / "file.pth", adapt=adapt.unwrap("model"))
    assert torch.equal(module.weight, state_dict["weight"])


@pytest.mark.parametrize("is_freed", [True, False])
def test_nothing_is_read_into_memory_that_is_not_there(tmp_path: Path, is_freed: bool) -> None:
    """As FSDP frees what its modules do not need at the moment; the read would go wherever the kernel lets it."""
    path = saved(tmp_path, nn.Linear(100, 100).state_dict())
    linear = nn.Linear(100, 100)
    linear.weight.data.untyped_storage().resize_(0 if is_freed else 100 * 100 * 4 - 4)
    with pytest.raises(LoadError, match="weight: its storage has been freed"):
        dist_load_into(linear, path)


def test_load_of_nothing_is_a_warning_with_a_guess(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, {f"module.{name}": tensor for name, tensor in nn.Linear(2, 3).state_dict().items()})
    dist_load_into(nn.Linear(2, 3), path, strict=False)
    assert "not one tensor of the Linear was loaded" in caplog.text and "strip_prefix('module.')" in caplog.text
    caplog.clear()
    dist_load_into(nn.Linear(2, 3), saved(tmp_path, {"bias": torch.ones(3)}), strict=False)
    assert not caplog.records


class WithStorage(nn.Module):
    """Has a bare storage as its extra state."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return torch.ones(3).untyped_storage()

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_that_is_a_storage(tmp_path: Path) -> None:
    torch.save(WithStorage().state_dict(), tmp_path / "file.pth")
    dist_load_into(module := WithStorage(), tmp_path / "file.pth")
    assert module.state.nbytes() == 12 and type(module.state) is type(torch.load(tmp_path / "file.pth")["_extra_state"])
