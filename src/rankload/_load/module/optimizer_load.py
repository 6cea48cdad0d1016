"""Plan and run the load of an optimizer's state; each rank loads its own part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from rankload._load.module.copies import Prepared, TensorCopy
from rankload._load.module.lazy_tensor import LazyTensor, MemoryTensor
from rankload._load.module.leaves import with_leaves
from rankload._load.module.mismatch import describe_mismatch
from rankload._load.module.remainder import OPTIMIZER_KEYS, optimizer_key
from rankload._load.module.slots import bare, empty_copy, is_distributed, is_plain, own_part
from rankload._text import printable, shown_key
from rankload.errors import LoadError

#: Largest number of a parameter. Larger numbers could be crafted such that their hashes collide.
_MAX_PARAMETERS = 1 << 31


@dataclass(frozen=True)
class OptimizerLoad:
    """The plan of an optimizer load that fits. Nothing has been written yet.

    Attributes:
        optimizer: target of the load.
        content: state dict for ``optimizer.load_state_dict``, with the optimizer's own parameter numbers, and lazy
            tensors in the place of tensors.
        parameters: parameters of the optimizer, by number.
        display_name: name of the checkpoint, for messages.
    """

    optimizer: torch.optim.Optimizer
    content: Mapping[str, Any]
    parameters: Sequence[torch.Tensor]
    display_name: str

    @property
    def wanted(self) -> list[tuple[LazyTensor, torch.Tensor | None]]:
        """Lazy tensors of the content, each with the sharded parameter that it is cut like, or None."""
        state = self.content["state"]
        parts = [(values, _of_number(self.parameters, key)) for key, values in state.items()]
        found: list[tuple[LazyTensor, torch.Tensor | None]] = []
        for part, parameter in [*parts, ({**self.content, "state": {}}, None)]:
            tensors: list[LazyTensor] = []
            _with_tensors(part, tensors.append)
            found += [(saved, _cut_like(saved, parameter)) for saved in tensors]
        return found


def plan_optimizer_load(
    optimizer: torch.optim.Optimizer, whole: Any, module: nn.Module, display_name: str
) -> OptimizerLoad:
    """Plan which state belongs to which parameter, and check that everything fits. Writes nothing.

    Args:
        optimizer: optimizer of the module's parameters.
        whole: content of the checkpoint, with lazy tensors.
        module: module whose parameter names identify states that were saved by name.
        display_name: name of the checkpoint, for messages.

    Raises:
        LoadError: the checkpoint has no optimizer state dict, or one for other parameters.
    """
    saved = _state_dict_in(whole, display_name)
    groups_in_file = _checked_groups(saved["param_groups"], display_name)
    own = _own_keys(optimizer, groups_in_file, module)
    saved_groups = _matched(groups_in_file, own, display_name)
    numbers = {key: number for number, key in enumerate(key for keys in own for key in keys)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # state without a parameter stays, as in torch; but a leftover number would mean another parameter here
    state = {
        numbers.get(key, key): values
        for key, values in saved["state"].items()
        if key in numbers or not isinstance(key, int)
    }
    unfit = [
        problem
        for number, parameter in enumerate(parameters)
        for problem in _problems(number, parameter, state.get(number, {}))
    ]
    if unfit:
        raise LoadError(
            f"{display_name} does not fit the {type(optimizer).__name__}:\n{describe_mismatch([], [], unfit, {})}"
        )
    groups = [
        {**group, "params": [numbers[key] for key in keys]} for group, keys in zip(saved_groups, own, strict=True)
    ]
    return OptimizerLoad(optimizer, {**saved, "state": state, "param_groups": groups}, parameters, display_name)


def prepare_optimizer_load(load: OptimizerLoad) -> Prepared:
    """Allocate this rank's own state tensors, which the first step overwrites. Return the copies to make."""
    copies: list[TensorCopy] = []

    def made(saved: LazyTensor, parameter: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(saved, MemoryTensor) and not is_plain(saved.exact()):
            return saved.exact().detach().clone()  # such as 8-bit states; the first step writes into the clone
        tensor, copy = _prepared(saved, parameter)
        copies.append(copy)
        return tensor

    state = {
        key: _with_tensors(values, partial(made, parameter=_of_number(load.parameters, key)))
        for key, values in load.content["state"].items()
    }
    content = {**_with_tensors({**load.content, "state": {}}, made), "state": state}
    return Prepared(copies, 0, lambda: _load(load, content))


def _load(load: OptimizerLoad, content: dict[str, Any]) -> None:
    try:
        load.optimizer.load_state_dict(content)
    except Exception as error:  # the optimizer's own code finds something else than it has saved
        what = printable(f"{type(error).__name__}: {error}")
        raise LoadError(f"{load.display_name} does not fit the {type(load.optimizer).__name__}: {what}") from error


def _of_number(parameters: Sequence[torch.Tensor], key: Any) -> torch.Tensor | None:
    return parameters[key] if isinstance(key, int) and 0 <= key < len(parameters) else None


def _with_tensors(content: Any, made: Callable[[LazyTensor], Any]) -> Any:
    """Return nested content with each lazy tensor replaced."""
    return with_leaves(content, lambda leaf: made(leaf) if isinstance(leaf, LazyTensor) else leaf)


def _state_dict_in(whole: Any, display_name: str) -> Mapping[str, Any]:
    if isinstance(whole, Mapping) and (key := optimizer_key(whole)) is not None:
        found: Any = whole[key]
        found = found if isinstance(found, Mapping) else found[0]
        if isinstance(found["state"], Mapping):
            return found  # type: ignore[no-any-return]
        kind = type(found["state"]).__name__
        raise LoadError(f"{display_name}: the state of its optimizer is of the type {kind}; expected a dict")
    keys = ", ".join(map(shown_key, islice(whole, 20))) if isinstance(whole, Mapping) else f"a {type(whole).__name__}"
    raise LoadError(
        f"{display_name}: no optimizer state dict under any of {', '.join(OPTIMIZER_KEYS)}; the checkpoint has {keys}"
    )


def _checked_groups(groups: Any, display_name: str) -> Sequence[Mapping[str, Any]]:
    """Return the saved groups, if they list their parameters by name or number, as torch.optim does.

    Raises:
        LoadError: they do not.
    """
    are_groups = type(groups) is list and all(
        isinstance(group, Mapping) and type(group.get("params")) is list for group in groups
    )
    keys = [key for group in groups for key in group["params"]] if are_groups else [None]
    if not all(type(key) is str or (type(key) is int and 0 <= key < _MAX_PARAMETERS) for key in keys):
        raise LoadError(f"{display_name}: its param_groups are not as torch.optim.Optimizer.state_dict() makes them")
    return groups  # type: ignore[no-any-return]


def _own_keys(
    optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]], module: nn.Module
) -> list[list[Any]]:
    """Return the keys of the optimizer's own parameters, by group: names if the saved keys are names, else numbers."""
    if any(isinstance(key, str) for group in saved for key in group["params"]):
        names = {id(parameter): name for name, parameter in bare(module)[0].named_parameters()}
        return [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    keys = iter([key for group in saved for key in group["params"]])
    return [[next(keys, None) for _ in group["params"]] for group in optimizer.param_groups]


def _matched(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Sequence[Any]], display_name: str
) -> list[Mapping[str, Any]]:
    """Return the saved group for each group of the optimizer: the one with the same parameters.

    Raises:
        LoadError: the parameters or their groups differ.
    """
    keys, own_keys = ([key for group in groups for key in group] for groups in ([g["params"] for g in saved], own))
    missing, unexpected = sorted({*own_keys} - {*keys}, key=str), sorted({*keys} - {*own_keys}, key=str)
    if all(isinstance(key, str) for key in keys) and (missing or unexpected):
        raise LoadError(f"{display_name} does not fit the optimizer:\n{describe_mismatch(missing, unexpected, [], {})}")
    groups = {frozenset(group["params"]): group for group in saved}
    if len(saved) != len(own) or not all(frozenset(group) in groups for group in own):
        sizes, own_sizes = [len(group["params"]) for group in saved], [len(group) for group in own]
        what = f"parameter groups of {sizes} parameters, the optimizer's have {own_sizes}"
        what += " and hold others" * (sizes == own_sizes)
        raise LoadError(f"{display_name} does not fit the optimizer: it has {what}")
    return [groups[frozenset(group)] for group in own]


def _problems(number: int, parameter: torch.Tensor, values: Any) -> list[str]:
    if not is_distributed(parameter) or not isinstance(values, Mapping):
        return []
    return [
        f"{key} of parameter {number} has the shape {list(value.shape)}, the parameter {list(parameter.shape)}"
        for key, value in values.items()
        if isinstance(value, LazyTensor) and value.shape.numel() > 1
        if value.shape != parameter.shape  # there is no rule for cutting such a state into parts
    ]


def _cut_like(saved: LazyTensor, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return the parameter if it is sharded, and a state tensor is sharded in the same way; else None."""
    is_alike = parameter is not None and is_distributed(parameter) and saved.shape == parameter.shape
    return parameter if is_alike and saved.shape else None


def _prepared(saved: LazyTensor, parameter: torch.Tensor | None) -> tuple[torch.Tensor, TensorCopy]:
    if (parameter := _cut_like(saved, parameter)) is not None:
        tensor = empty_copy(parameter, own_part(parameter)[0].device, saved.dtype)
    else:
        tensor = torch.empty(saved.shape, dtype=saved.dtype, device="cpu")
    return tensor, TensorCopy(saved, *own_part(tensor))
