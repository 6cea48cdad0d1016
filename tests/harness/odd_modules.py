"""Modules that are loaded in unusual ways: with hooks, overrides, quantised, lazy, of tensors of other classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.nn.utils import parametrize

Make = Callable[[], nn.Module]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class Holding(nn.Module):
    """Has one tensor, as a parameter or as a buffer."""

    def __init__(self, tensor: torch.Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        if isinstance(tensor, nn.Parameter):
            self.held = tensor
        else:
            self.register_buffer("held", tensor, persistent=persistent)


class WithExtraState(nn.Linear):
    def __init__(self, state: Any = None) -> None:
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class WithHooks(nn.Linear):
    """Renames before, and counts after."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.loads = 0
        self.register_load_state_dict_pre_hook(self._rename)
        self.register_load_state_dict_post_hook(self._count)

    @staticmethod
    def _rename(module: Any, state_dict: Any, prefix: str, *_: Any) -> None:
        if f"{prefix}matrix" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}matrix").t()

    @staticmethod
    def _count(module: Any, keys: Any) -> None:
        module.loads += 1


class Converting(nn.Linear):
    """Overrides what torch calls for each module."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.kept: Any = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}kept"] = (torch.Size([2]), torch.float16, torch.ones(2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.kept = state_dict.pop(f"{prefix}kept")
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


class OwnParameter(nn.Parameter):
    """A parameter of a class of its own."""


class OwnTensor(torch.Tensor):
    """A tensor with a ``__torch_function__`` of its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return super().__torch_function__(function, types, arguments, keywords or {})


class Doubled(nn.Module):
    """A parametrisation with an inverse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def parametrised() -> nn.Module:
    module = nn.Linear(3, 2)
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def dynamically_quantised() -> nn.Module:
    return quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {nn.Linear})


def dynamically_quantised_rnn() -> nn.Module:
    return quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 2)), {nn.LSTM})


def statically_quantised() -> nn.Module:
    module = nn.Sequential(quantization.QuantStub(), nn.Conv2d(1, 2, 3), nn.ReLU(), quantization.DeQuantStub()).eval()
    module.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(module, inplace=True)
    module(torch.randn(1, 1, 5, 5))
    quantization.convert(module, inplace=True)
    return module


def with_observers(*, is_trained: bool) -> Make:
    """Make modules between float and quantised ones: their observers resize their buffers when they are loaded."""

    def make() -> nn.Module:
        module = nn.Sequential(quantization.QuantStub(), nn.Conv2d(1, 2, 3), quantization.DeQuantStub()).train(
            is_trained
        )
        if is_trained:
            module.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            quantization.prepare_qat(module, inplace=True)
        else:
            module.qconfig = quantization.get_default_qconfig("fbgemm")
            quantization.prepare(module, inplace=True)
        return module

    return make


def used(make: Make, *shape: int) -> Make:
    def make_used() -> nn.Module:
        module = make()
        module(torch.randn(*shape))
        return module

    return make_used


def with_attribute(state_dict: Any) -> Any:
    """Parameters as keep_vars=True gives them, with what frameworks note on them."""
    for name, tensor in [*state_dict.items()]:
        state_dict[name] = parameter = nn.Parameter(tensor)
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
    return state_dict


class Overriding(nn.Linear):
    """Overrides load_state_dict itself."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.kept: Any = None

    def load_state_dict(self, state_dict: Any, *arguments: Any, **keywords: Any) -> Any:
        self.kept = {name: type(value) for name, value in state_dict.items()}
        return super().load_state_dict(
            {name: tensor + 1 for name, tensor in state_dict.items()}, *arguments, **keywords
        )


class CopyingByHand(nn.Linear):
    """Copies into ``data``, as older code does, without what torch does."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.weight.data.copy_(state_dict[f"{prefix}weight"].t())
        self.bias.data[:] = state_dict[f"{prefix}bias"]


def initialised(module: nn.Module, *shape: int) -> Make:
    def make() -> nn.Module:
        module(torch.randn(*shape))
        return module

    return make
