"""An optimizer's state out of a training checkpoint, each rank its own part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankload._deliver.mismatch import describe_mismatch
from rankload._deliver.places import bare, empty_copy, is_distributed, own_part
from rankload._deliver.saved import SavedTensor
from rankload._deliver.transfers import Prepared, Transfer
from rankload._errors import LoadError

#: Under which keys training scripts save the optimizer: torch's tutorials, timm, fairseq, Lightning (a list).
_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optimizer_states")


@dataclass(frozen=True)
class OptimizerLoad:
    """A load that fits, and of which nothing has been done yet.

    Attributes:
        optimizer: where to.
        groups: the saved ``param_groups``, with the optimizer's own numbers of parameters.
        state: by these numbers; stand-ins in the place of tensors.
        parameters: the optimizer's, by number.
    """

    optimizer: torch.optim.Optimizer
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[int, Mapping[str, Any]]
    parameters: Sequence[torch.Tensor]

    @property
    def wanted(self) -> list[SavedTensor]:
        """Return the tensors that it takes."""
        return [value for values in self.state.values() for value in values.values() if isinstance(value, SavedTensor)]


def plan_optimizer_load(optimizer: torch.optim.Optimizer, whole: Any, module: nn.Module, shown: str) -> OptimizerLoad:
    """Find out which state belongs to which parameter, and whether it fits. Writes nothing.

    Args:
        optimizer: of the module's parameters.
        whole: the checkpoint's content, with stand-ins.
        module: gives the names, for states that are saved by name.
        shown: where the checkpoint is, for messages.

    Raises:
        LoadError: there is no optimizer's state dict, or it is of other parameters.
    """
    saved = _state_dict_in(whole, shown)
    own_groups = optimizer.param_groups
    numbers = _numbers(saved["param_groups"], own_groups, module, shown)
    parameters = [parameter for group in own_groups for parameter in group["params"]]
    state = {numbers[key]: values for key, values in saved["state"].items() if key in numbers}
    unfit = [problem for number, values in state.items() for problem in _problems(number, parameters[number], values)]
    if unfit:
        raise LoadError(f"{shown} does not fit the {type(optimizer).__name__}:\n{describe_mismatch([], [], unfit, {})}")
    first = 0
    groups = []
    for group, own in zip(saved["param_groups"], own_groups, strict=True):
        groups.append({**group, "params": list(range(first, first + len(own["params"])))})
        first += len(own["params"])
    return OptimizerLoad(optimizer, groups, state, parameters)


def prepare_optimizer_load(load: OptimizerLoad, *, may_share: bool) -> Prepared:
    """Make the tensors of the state; say what is to be moved into them.

    Args:
        load: the plan.
        may_share: on the CPU a state may be a view of the mapped file.
    """
    transfers: list[Transfer] = []
    bytes_mapped, state = 0, {}
    for number, values in load.state.items():
        state[number] = {**values}
        for key, saved in values.items():
            if isinstance(saved, SavedTensor):
                tensor, transfer = _prepared(saved, load.parameters[number], may_share=may_share)
                state[number][key] = tensor
                if transfer is None:
                    bytes_mapped += tensor.nbytes
                else:
                    transfers.append(transfer)

    def finish() -> None:
        load.optimizer.load_state_dict({"state": state, "param_groups": list(load.groups)})

    return Prepared(transfers, bytes_mapped, finish)


def _state_dict_in(whole: Any, shown: str) -> Mapping[str, Any]:
    for key in _KEYS if isinstance(whole, Mapping) else ():
        found = whole.get(key)
        if isinstance(found, (list, tuple)) and len(found) == 1:
            found = found[0]
        if isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys():
            return found
    keys = ", ".join(map(repr, whole)) if isinstance(whole, Mapping) else f"a {type(whole).__name__}"
    raise LoadError(f"{shown}: no optimizer's state dict under any of {', '.join(_KEYS)}; it has {keys[:1000]}")


def _numbers(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], module: nn.Module, shown: str
) -> dict[Any, int]:
    """Map the saved keys, numbers or names, to the numbers of the optimizer's parameters."""
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if sizes != own_sizes:
        what = f"parameter groups of {sizes} parameters, the optimizer's have {own_sizes}"
        raise LoadError(f"{shown} does not fit the optimizer: it has {what}")
    keys = [key for group in saved for key in group["params"]]
    if not any(isinstance(key, str) for key in keys):
        return {key: number for number, key in enumerate(keys)}
    names = {id(parameter): name for name, parameter in bare(module)[0].named_parameters()}
    own_names = [names.get(id(parameter), "") for group in own for parameter in group["params"]]
    if missing := [name for name in own_names if name not in keys]:
        unexpected = [key for key in keys if key not in own_names]
        raise LoadError(f"{shown} does not fit the optimizer:\n{describe_mismatch(missing, unexpected, [], {})}")
    return {name: number for number, name in enumerate(own_names)}


def _problems(number: int, parameter: torch.Tensor, values: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} of parameter {number} has the shape {list(value.shape)}, the parameter {list(parameter.shape)}"
        for key, value in values.items()
        if isinstance(value, SavedTensor) and is_distributed(parameter) and value.shape.numel() > 1
        if value.shape != parameter.shape  # how it would be cut into parts, nobody can say
    ]


def _prepared(saved: SavedTensor, parameter: torch.Tensor, *, may_share: bool) -> tuple[torch.Tensor, Transfer | None]:
    if is_distributed(parameter) and saved.shape == parameter.shape and saved.shape:
        tensor = empty_copy(parameter, own_part(parameter)[0].device, saved.dtype)
        return tensor, Transfer(saved, *own_part(tensor))
    if may_share and saved.shape:
        return saved.view(), None
    tensor = torch.empty(saved.shape, dtype=saved.dtype, device="cpu")
    return tensor, Transfer(saved, *own_part(tensor))
