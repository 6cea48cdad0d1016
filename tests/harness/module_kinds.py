"""Modules of every kind that torch has, small, for comparing ways to load them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from harness.odd_modules import (
    Converting,
    CopyingByHand,
    Holding,
    Make,
    Overriding,
    OwnParameter,
    OwnTensor,
    Tied,
    WithExtraState,
    WithHooks,
    dynamically_quantised,
    dynamically_quantised_rnn,
    initialised,
    parametrised,
    statically_quantised,
    used,
    with_attribute,
    with_observers,
)


@dataclass(frozen=True)
class Kind:
    """One kind of module.

    Attributes:
        make: a module with random weights; the one that is loaded into, too, unless there is another.
        into: makes that one.
        change: what happens to the state dict before it is saved.
        is_unsafe: the file needs ``weights_only=False``.
        has_meta: whether such a module can be made on the meta device.
    """

    make: Make
    into: Make | None = None
    change: Callable[[Any], Any] = lambda state_dict: state_dict
    is_unsafe: bool = False
    has_meta: bool = True

    def saved(self) -> Any:
        """Return what is saved."""
        return self.change(self.make().state_dict())

    def target(self) -> nn.Module:
        """Return a new module to load into."""
        return (self.into or self.make)()


def random(*shape: int, **keywords: Any) -> torch.Tensor:
    return torch.randn(*shape, **keywords)


def without(name: str) -> Callable[[Any], Any]:
    def change(state_dict: Any) -> Any:
        del state_dict[name]
        return state_dict

    return change


def with_value(name: str, value: Any) -> Callable[[Any], Any]:
    def change(state_dict: Any) -> Any:
        state_dict[name] = value
        return state_dict

    return change


def renamed(state_dict: Any) -> Any:
    state_dict["matrix"] = state_dict.pop("weight").t()
    return state_dict


def old_batch_norm(state_dict: Any) -> Any:
    del state_dict["num_batches_tracked"]
    state_dict._metadata[""]["version"] = 1
    return state_dict


def assigned_before(state_dict: Any) -> Any:
    """What load_state_dict(assign=True) leaves in it."""
    nn.Linear(3, 2).load_state_dict(state_dict, assign=True)
    assert state_dict._metadata[""]["assign_to_params_buffers"]
    return OrderedDict(state_dict) if not hasattr(state_dict, "_metadata") else state_dict


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda: nn.Linear(3, 2)),
    "nested": Kind(lambda: nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm(3)))),
    "batch norm": Kind(lambda: nn.BatchNorm1d(3)),
    "old batch norm": Kind(lambda: nn.BatchNorm1d(3), change=old_batch_norm),
    "instance norm": Kind(lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
    "tied": Kind(Tied),
    "parametrised": Kind(parametrised),
    "pruned": Kind(lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 2), has_meta=False),
    "spectral norm": Kind(lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), has_meta=False),
    "old spectral norm": Kind(lambda: spectral_norm(nn.Linear(3, 2)), has_meta=False),
    "weight norm": Kind(lambda: parametrizations.weight_norm(nn.Linear(3, 2))),
    "old weight norm": Kind(lambda: weight_norm(nn.Linear(3, 2)), has_meta=False),
    "weight norm of its old form": Kind(
        lambda: weight_norm(nn.Linear(3, 2)), into=lambda: parametrizations.weight_norm(nn.Linear(3, 2)), has_meta=False
    ),
    "dynamically quantised": Kind(dynamically_quantised, has_meta=False),
    "dynamically quantised rnn": Kind(dynamically_quantised_rnn, is_unsafe=True, has_meta=False),
    "statically quantised": Kind(statically_quantised, has_meta=False),
    "observed": Kind(
        used(with_observers(is_trained=False), 1, 1, 5, 5), into=with_observers(is_trained=False), has_meta=False
    ),
    "quantisation aware": Kind(
        used(with_observers(is_trained=True), 1, 1, 5, 5), into=with_observers(is_trained=True), has_meta=False
    ),
    "quantised per channel": Kind(
        lambda: Holding(
            torch.quantize_per_channel(random(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8)
        ),
        has_meta=False,
    ),
    "quantised buffer": Kind(
        lambda: Holding(torch.quantize_per_tensor(random(4), 0.1, 3, torch.qint8)), has_meta=False
    ),
    "lazy": Kind(lambda: nn.LazyLinear(2), is_unsafe=True, has_meta=False),
    "lazy from initialised": Kind(
        initialised(nn.LazyLinear(2), 1, 3), into=lambda: nn.LazyLinear(2), is_unsafe=True, has_meta=False
    ),
    "lazy batch norm from initialised": Kind(
        initialised(nn.LazyBatchNorm1d(), 2, 3), into=nn.LazyBatchNorm1d, is_unsafe=True, has_meta=False
    ),
    "initialised from lazy": Kind(
        lambda: nn.LazyLinear(2), into=lambda: nn.Linear(3, 2), is_unsafe=True, has_meta=False
    ),
    "extra state": Kind(lambda: WithExtraState({"shape": torch.Size([2]), "t": random(3)})),
    "missing extra state": Kind(WithExtraState, change=without("_extra_state")),
    "hooks": Kind(WithHooks),
    "hooks that rename": Kind(WithHooks, change=renamed),
    "own load": Kind(Converting),
    "own load of everything": Kind(Overriding, has_meta=False),
    "copies by hand": Kind(CopyingByHand, has_meta=False),
    "parameters with attributes": Kind(lambda: nn.Linear(3, 2), change=with_attribute),
    "empty": Kind(lambda: Holding(torch.empty(0, 3))),
    "nothing": Kind(lambda: nn.Sequential(nn.ReLU())),
    "buffer that requires a gradient": Kind(
        lambda: Holding(random(2)), change=lambda d: {"held": d["held"].requires_grad_()}, has_meta=False
    ),
    "buffer": Kind(lambda: Holding(random(3))),
    "non-persistent buffer": Kind(lambda: nn.Sequential(Holding(random(3), persistent=False), nn.Linear(1, 1))),
    "rnn": Kind(lambda: nn.LSTM(2, 3, 2, bidirectional=True)),
    "attention": Kind(lambda: nn.MultiheadAttention(4, 2)),
    "transformer": Kind(lambda: nn.TransformerEncoderLayer(4, 2, 8)),
    "parameter list": Kind(lambda: nn.ParameterList([nn.Parameter(random(2)), nn.Parameter(random(3))])),
    "parameter dict": Kind(lambda: nn.ParameterDict({"a": nn.Parameter(random(2)), "b": nn.Parameter(random(3))})),
    "module list": Kind(lambda: nn.ModuleList([nn.Linear(1, 2), nn.Linear(2, 1)])),
    "module dict": Kind(lambda: nn.ModuleDict({"a": nn.Linear(1, 2), "b": nn.ReLU()})),
    "sparse buffer": Kind(lambda: Holding(torch.eye(3).mul(random(3)).to_sparse()), has_meta=False),
    "sparse buffer on meta": Kind(
        lambda: Holding(torch.eye(3).mul(random(3)).to_sparse()),
        into=lambda: Holding(torch.sparse_coo_tensor(size=(3, 3))),
    ),
    "sparse csr buffer": Kind(lambda: Holding(torch.eye(3).mul(random(3)).to_sparse_csr()), has_meta=False),
    "sparse into dense": Kind(
        lambda: Holding(torch.eye(3).to_sparse()), into=lambda: Holding(torch.zeros(3, 3)), has_meta=False
    ),
    "dense into sparse": Kind(
        lambda: Holding(torch.eye(3)), into=lambda: Holding(torch.zeros(3, 3).to_sparse()), has_meta=False
    ),
    "quantised into float": Kind(
        lambda: Holding(torch.quantize_per_tensor(random(4), 0.1, 3, torch.qint8)),
        into=lambda: Holding(torch.zeros(4)),
        has_meta=False,
    ),
    "complex": Kind(lambda: Holding(nn.Parameter(random(3, dtype=torch.complex64)))),
    "conjugated": Kind(lambda: Holding(random(3, dtype=torch.complex64)), change=lambda d: {"held": d["held"].conj()}),
    "float8": Kind(lambda: Holding(random(8).to(torch.float8_e4m3fn))),
    "integer": Kind(lambda: Holding(torch.randint(9, (3,)))),
    "other dtype": Kind(lambda: nn.Linear(3, 2, dtype=torch.float64), into=lambda: nn.Linear(3, 2), has_meta=False),
    "subclass of a parameter": Kind(
        lambda: Holding(OwnParameter(random(3))),
        change=lambda d: {"held": OwnParameter(d["held"])},
        is_unsafe=True,
        has_meta=False,
    ),
    "plain into a subclass of a parameter": Kind(
        lambda: Holding(nn.Parameter(random(3))), into=lambda: Holding(OwnParameter(random(3)))
    ),
    "subclass of a tensor": Kind(
        lambda: Holding(nn.Parameter(random(3).as_subclass(OwnTensor))), is_unsafe=True, has_meta=False
    ),
    "plain into a subclass of a tensor": Kind(
        lambda: Holding(nn.Parameter(random(3))), into=lambda: Holding(nn.Parameter(random(3).as_subclass(OwnTensor)))
    ),
    "wrapper subclass": Kind(
        lambda: Holding(nn.Parameter(TwoTensor(random(3), random(3)))), is_unsafe=True, has_meta=False
    ),
    "meta in the file": Kind(lambda: nn.Linear(3, 2, device="meta"), into=lambda: nn.Linear(3, 2), has_meta=False),
    "assigned before": Kind(lambda: nn.Linear(3, 2), change=assigned_before),
    "assigned before, other dtype": Kind(
        lambda: nn.Linear(3, 2, dtype=torch.float64), into=lambda: nn.Linear(3, 2), change=assigned_before
    ),
    "scalar of old files": Kind(lambda: Holding(random(1)), into=lambda: Holding(torch.tensor(1.0))),
    "missing": Kind(lambda: nn.Linear(3, 2), change=without("bias")),
    "unexpected": Kind(lambda: nn.Linear(3, 2), change=with_value("more", torch.ones(1))),
    "unexpected value": Kind(lambda: nn.Linear(3, 2), change=with_value("epoch", 3)),
    "not a tensor": Kind(lambda: nn.Linear(3, 2), change=with_value("bias", [1.0, 2.0])),
    "wrong shape": Kind(lambda: nn.Linear(3, 2), into=lambda: nn.Linear(4, 2)),
}
