"""Plan and run a load from an opened checkpoint into a module."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from rankload._load.module.content import CheckpointContent
from rankload._load.module.copies import Prepared, TensorCopy
from rankload._load.module.lazy_tensor import Assignment, LazyTensor, MemoryTensor
from rankload._load.module.mismatch import describe_mismatch
from rankload._load.module.module_versions import assigned_modules, without_assignment
from rankload._load.module.noted_copies import NotedCopies
from rankload._load.module.post_hooks import PostHook, postponed, run_hooks
from rankload._load.module.replace import Replacer
from rankload._load.module.slots import (
    TensorSlot,
    bare,
    has_its_storage,
    is_distributed,
    is_plain,
    non_persistent_meta_buffers,
    own_part,
    tensor_slots,
)
from rankload.adapt import strip_prefix
from rankload.errors import LoadError

_logger = logging.getLogger("rankload")


@dataclass(frozen=True)
class ModuleLoad:
    """The plan of a load that fits. Nothing has been written yet.

    Attributes:
        module: module without its wrappers.
        assignments: one step for each tensor of the module that the checkpoint has.
        missing_keys, unexpected_keys: see ``load_state_dict``.
        hooks: the module's own post hooks, which run after all copies and may change the keys.
        misfit: makes the error for missing or unexpected keys; None if they are allowed.
        warning: text for the log if the load is odd, but no error; else empty.
    """

    module: nn.Module
    assignments: Sequence[Assignment]
    missing_keys: list[str]
    unexpected_keys: list[str]
    hooks: Sequence[PostHook]
    misfit: Callable[[], LoadError] | None
    warning: str = ""


def plan_load(
    module: nn.Module,
    content: CheckpointContent,
    *,
    strict: bool,
    assign: bool | None,
    display_name: str,
    may_replace: bool = True,
) -> ModuleLoad:
    """Plan which tensor goes where, and check that everything fits. Writes nothing except extra state.

    Args:
        module: the module, wrapped or not.
        content: content of the checkpoint.
        strict: whether checkpoint and module must have the same names.
        assign: the caller's ``assign=``; with True tensors keep the checkpoint's dtype, whatever the module's.
        display_name: name of the checkpoint, for messages.
        may_replace: whether to replace tensors if the state dict asks for it (`assigned_modules`).

    Raises:
        LoadError: the checkpoint does not fit; the message lists the mismatches, and gives advice.
    """
    module, prefix = bare(module)
    own = tensor_slots(module)
    state_dict = _without_wrapper(content.of_module, prefix, own)
    replaced = assigned_modules(state_dict) if may_replace else set[str]()
    noting = NotedCopies((slot.tensor for slot in own), content.tensors, content.assignments)
    with postponed(module) as hooks, noting, _without_warnings_of_meta():
        missing, unexpected, unfit = _ask_torch(module, without_assignment(state_dict))
    names = {id(slot.tensor): slot.name for slot in reversed(own)}
    steps = [
        replace(step, is_replaced=bool(assign) or names.get(id(step.target), "").rpartition(".")[0] in replaced)
        for step in content.assignments
    ]
    for step in steps:
        if problem := _problem(step):
            unfit.append(f"{names.get(id(step.target), 'a tensor')}: {problem}")
    missing = _truly_missing(missing, own, steps)

    def misfit() -> LoadError:
        text = describe_mismatch(missing, unexpected, unfit, state_dict)
        return LoadError(
            f"{display_name} does not fit the {type(module).__name__}:\n{text}",
            missing_count=len(missing),
            unexpected_count=len(unexpected),
            unfit_count=len(unfit),
        )

    # hooks may change the keys, but run only after the copies: run_post_hooks checks the keys then
    if unfit or (strict and (missing or unexpected) and not hooks):
        raise misfit()
    warning = ""
    if own and state_dict and not steps:  # a load with strict=False that matches no name at all is hardly intended
        warning = f"not one tensor of the {type(module).__name__} was loaded: {misfit().message}"
    return ModuleLoad(
        module, _without_repetitions(steps), missing, unexpected, hooks, misfit if strict else None, warning
    )


def prepare_load(load: ModuleLoad, device: Callable[[], torch.device], *, may_share: bool) -> Prepared:
    """Allocate new tensors, and return the copies to make.

    Each tensor on the meta device is replaced by a tensor on this rank's device. On the CPU that is a view of the
    mapped file if the dtypes are equal. Assignments that replace do the same with the checkpoint's dtype. Tied tensors
    stay tied. The new tensors take their places after all copies.

    Args:
        load: the plan.
        device: returns the device for tensors that are on the meta device now.
        may_share: whether new tensors may be views of the mapped file.
    """
    replacer = Replacer(load.module, device, may_share=may_share)
    own = {
        id(slot.tensor) for slot in tensor_slots(load.module)
    }  # a module may have something copied into a view of one
    copies = [
        replacer.copy(step)
        if (step.target.is_meta or step.is_replaced) and id(step.target) in own
        else _transfer_in_place(step)
        for step in load.assignments
    ]

    def finish() -> None:
        replacer.finish()
        _check_materialised(load)

    return Prepared([copy for copy in copies if copy], replacer.bytes_mapped, finish)


def _transfer_in_place(step: Assignment) -> TensorCopy:
    """Return the copy into a target, and increment the target's version.

    The copy bypasses autograd. A backward pass that needs the old elements must fail, as after any in-place write.
    """
    copy = TensorCopy(step.saved, *own_part(step.target))
    for tensor in (step.target, copy.destination):  # a DTensor and its local tensor have separate versions
        if not tensor.is_inference():  # inference tensors have no versions
            increment_version(tensor)
    return copy


def run_post_hooks(load: ModuleLoad) -> None:
    """Run the module's load_state_dict post hooks, as the last step.

    Raises:
        LoadError: keys are still missing or unexpected after the hooks.
    """
    run_hooks(load.hooks, load.missing_keys, load.unexpected_keys)
    if load.misfit is not None and (load.missing_keys or load.unexpected_keys):
        raise load.misfit()


def left_on_meta(load: ModuleLoad) -> list[str]:
    """Return the buffers that the script has to compute, and log a warning."""
    names = non_persistent_meta_buffers(load.module)
    if names:
        _logger.warning("buffers still on the meta device, for no checkpoint has them: %s", ", ".join(names))
    return names


def _ask_torch(module: nn.Module, content: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Call load_state_dict. Return the missing keys, the unexpected keys, and torch's sentences on other mismatches."""
    try:
        keys = module.load_state_dict(content, strict=False)
    except RuntimeError as error:  # shapes differ; torch's error does not list the keys then
        own = {slot.name for slot in tensor_slots(module)}
        unfit = str(error).split("\n\t")[1:] or [str(error)]
        return [name for name in own if name not in content], [name for name in content if name not in own], unfit
    missing, unexpected = keys or ([], [])  # a module's own load_state_dict may return None
    return list(missing), list(unexpected), []


@contextmanager
def _without_warnings_of_meta() -> Iterator[None]:
    """Suppress torch's warning that copies to the meta device do nothing: rankload replaces those tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter in the checkpoint to a meta")
        yield


def _without_wrapper(content: Mapping[str, Any], prefix: str, own: Sequence[TensorSlot]) -> Mapping[str, Any]:
    """Remove a wrapper's prefix, so that a wrapped module can load its own state dict: ``ddp.state_dict()``."""
    if not prefix or not content or not all(name.startswith(prefix) for name in content):
        return content
    if any(slot.name in content for slot in own):  # the prefix is the name of a child
        return content
    return strip_prefix(prefix)(content)  # type: ignore[no-any-return]


def _truly_missing(missing: Sequence[str], own: Sequence[TensorSlot], assignments: Sequence[Assignment]) -> list[str]:
    """Leave out names of tied tensors that are loaded under another name: files often store tied tensors once."""
    found = {id(step.target) for step in assignments}
    tied = {slot.name for slot in own if id(slot.tensor) in found}
    return [name for name in missing if name not in tied]


def _without_repetitions(assignments: Sequence[Assignment]) -> list[Assignment]:
    """Keep the last assignment to each tensor, as if all were made in order."""
    return list({id(step.target): step for step in assignments}.values())


def _problem(step: Assignment) -> str:
    target, saved, is_replaced = step.target, step.saved, step.is_replaced
    if saved.device.type == "meta" and not is_replaced:
        return "it has no data in the checkpoint, for it was saved from the meta device"
    if is_replaced and target.requires_grad and not (saved.dtype.is_floating_point or saved.dtype.is_complex):
        return f"{saved.dtype} in the checkpoint cannot require a gradient, but the module's parameter does"
    if not is_replaced and not _can_convert(saved.dtype, target.dtype):
        return f"{saved.dtype} in the checkpoint cannot be converted to the module's {target.dtype}"
    if not is_replaced and not target.is_meta and not is_distributed(target) and _overlaps_itself(target):
        return "several of its elements share memory (expand); clone() it to load into it"
    try:
        own, _ = own_part(target)
    except ValueError as error:
        return str(error)
    if not is_replaced and not target.is_meta and not has_its_storage(own):
        return "its storage has been freed or resized, as FSDP does outside of forward"
    return "" if is_replaced or target.is_meta or is_distributed(target) else _problem_of_classes(target, saved)


def _problem_of_classes(target: torch.Tensor, saved: LazyTensor) -> str:
    """Try a copy between unusual classes, layouts or quantisations. Return why it fails; empty if it works."""
    if is_plain(target) and not (isinstance(saved, MemoryTensor) and not is_plain(saved.exact())):
        return ""
    try:
        scratch = target.detach().clone()
    except Exception:  # the class cannot be cloned: only the real copy can tell
        return ""
    try:
        with torch.no_grad():
            scratch.copy_(saved.view())
    except Exception as error:
        return f"it cannot be copied: {error}"
    return ""


#: The dtype of pairs of numbers of four bits; None if this torch has none.
_PAIRS = getattr(torch, "float4_e2m1fn_x2", None)


def _can_convert(saved: torch.dtype, own: torch.dtype) -> bool:
    """Return whether torch can cast between the dtypes. Masks may be integers: torch once saved them as bytes."""
    if saved != own and _PAIRS in (saved, own):  # torch.can_cast says that torch could
        return False
    is_mask = own == torch.bool and not (saved.is_floating_point or saved.is_complex)
    return is_mask or torch.can_cast(saved, own)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _check_materialised(load: ModuleLoad) -> None:
    missing = set(load.missing_keys)
    if any(step.is_replaced and step.saved.device.type == "meta" for step in load.assignments):
        return  # the checkpoint itself has meta tensors, which are allowed to replace others
    if names := [slot.name for slot in tensor_slots(load.module) if slot.tensor.is_meta and slot.name not in missing]:
        raise LoadError(
            f"{', '.join(names[:20])}: computed by a hook of the module, but lost on the meta device; "
            "call module.to_empty() before the load"
        )
