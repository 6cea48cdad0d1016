"""Plan and carry out a load from an opened checkpoint into a module."""

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
    """A load that fits, and of which nothing has been done yet.

    Attributes:
        module: without its wrappers.
        assignments: one for each tensor of the module that the checkpoint has.
        missing_keys, unexpected_keys: as ``load_state_dict`` returns them.
        hooks: the module's own, to be run when all is moved; they may change the keys.
        misfit: makes the error for keys that are missing or unexpected; None where they may be.
        warning: what is odd about a load that is no error.
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
    """Find out which tensor goes where, and whether everything fits. Writes nothing, but for extra state.

    Args:
        module: wrapped or not.
        content: the checkpoint's.
        strict: every name must be on both sides.
        assign: the caller's; with True tensors keep the checkpoint's dtype, whatever the module's was.
        display_name: where the checkpoint is, for messages.
        may_replace: replace tensors where the state dict says so (`assigned_modules`).

    Raises:
        LoadError: it does not fit; the message lists what, and what would help.
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

    # a hook may have something to say about keys, and runs only when the tensors are there
    if unfit or (strict and (missing or unexpected) and not hooks):
        raise misfit()
    warning = ""
    if own and state_dict and not steps:  # strict=False is for some names, and hardly for none
        warning = f"not one tensor of the {type(module).__name__} was loaded: {misfit().message}"
    return ModuleLoad(
        module, _without_repetitions(steps), missing, unexpected, hooks, misfit if strict else None, warning
    )


def prepare_load(load: ModuleLoad, device: Callable[[], torch.device], *, may_share: bool) -> Prepared:
    """Make the tensors that have to be made; say what is to be moved where.

    Tensors on the meta device are replaced, each by one on this rank's device, or, on the CPU, by a view of the mapped
    file, if its dtype is the module's; tied ones stay tied. So are those of assignments that replace, with the
    checkpoint's dtype. Each takes its place when all is moved.

    Args:
        load: the plan.
        device: gives the device for what is on the meta device now.
        may_share: whether what is replaced may be views of the mapped file.
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
    """Let a backward that needs what the target holds now fail, as after any write in place: reads go past torch."""
    copy = TensorCopy(step.saved, *own_part(step.target))
    for tensor in (step.target, copy.destination):  # a DTensor, and the local one, count for themselves
        if not tensor.is_inference():  # which have no versions
            increment_version(tensor)
    return copy


def run_post_hooks(load: ModuleLoad) -> None:
    """Run what the module has registered to run after load_state_dict: the last step.

    Raises:
        LoadError: keys are missing or unexpected, and the hooks have left them so.
    """
    run_hooks(load.hooks, load.missing_keys, load.unexpected_keys)
    if load.misfit is not None and (load.missing_keys or load.unexpected_keys):
        raise load.misfit()


def left_on_meta(load: ModuleLoad) -> list[str]:
    """Return the buffers that the script has to compute, and say so in the log."""
    names = non_persistent_meta_buffers(load.module)
    if names:
        _logger.warning("still on the meta device, for no checkpoint holds them: %s", ", ".join(names))
    return names


def _ask_torch(module: nn.Module, content: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Return the missing keys, the unexpected ones, and torch's sentences on those that do not fit."""
    try:
        keys = module.load_state_dict(content, strict=False)
    except RuntimeError as error:  # of shapes: then it does not tell the keys
        own = {slot.name for slot in tensor_slots(module)}
        unfit = str(error).split("\n\t")[1:] or [str(error)]
        return [name for name in own if name not in content], [name for name in content if name not in own], unfit
    missing, unexpected = keys or ([], [])  # one that a module has of its own may return nothing
    return list(missing), list(unexpected), []


@contextmanager
def _without_warnings_of_meta() -> Iterator[None]:
    """Within, torch does not warn that it copies nothing to the meta device: that is not where it is copied to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter in the checkpoint to a meta")
        yield


def _without_wrapper(content: Mapping[str, Any], prefix: str, own: Sequence[TensorSlot]) -> Mapping[str, Any]:
    """Let a wrapped module take what was saved from a wrapped one: ``ddp.state_dict()`` into ``ddp``."""
    if not prefix or not content or not all(name.startswith(prefix) for name in content):
        return content
    if any(slot.name in content for slot in own):  # it has a child of that name
        return content
    return strip_prefix(prefix)(content)  # type: ignore[no-any-return]


def _truly_missing(missing: Sequence[str], own: Sequence[TensorSlot], assignments: Sequence[Assignment]) -> list[str]:
    """Leave out names of tensors that come under another of their names: files often hold tied tensors once."""
    found = {id(step.target) for step in assignments}
    tied = {slot.name for slot in own if id(slot.tensor) in found}
    return [name for name in missing if name not in tied]


def _without_repetitions(assignments: Sequence[Assignment]) -> list[Assignment]:
    """Keep the last for each tensor, as if they were made in order."""
    return list({id(step.target): step for step in assignments}.values())


def _problem(step: Assignment) -> str:
    target, saved, is_replaced = step.target, step.saved, step.is_replaced
    if saved.device.type == "meta" and not is_replaced:
        return "it has no data in the checkpoint, where it is on the meta device"
    if is_replaced and target.requires_grad and not (saved.dtype.is_floating_point or saved.dtype.is_complex):
        return f"{saved.dtype} in the checkpoint, and the module's parameter requires a gradient"
    if not is_replaced and not _can_convert(saved.dtype, target.dtype):
        return f"{saved.dtype} in the checkpoint cannot be converted to the module's {target.dtype}"
    if not is_replaced and not target.is_meta and not is_distributed(target) and _overlaps_itself(target):
        return "several of its elements are one in memory (expand); clone() it to load into it"
    try:
        own, _ = own_part(target)
    except ValueError as error:
        return str(error)
    if not is_replaced and not target.is_meta and not has_its_storage(own):
        return "its memory is not there: its storage has been freed or resized, as FSDP does outside of forward"
    return "" if is_replaced or target.is_meta or is_distributed(target) else _problem_of_classes(target, saved)


def _problem_of_classes(target: torch.Tensor, saved: LazyTensor) -> str:
    """Return why a copy fails that classes, layouts and quantisation have a say in: only trying it tells."""
    if is_plain(target) and not (isinstance(saved, MemoryTensor) and not is_plain(saved.exact())):
        return ""
    try:
        scratch = target.detach().clone()
    except Exception:  # of a class that cannot be cloned: then we shall see
        return ""
    try:
        with torch.no_grad():
            scratch.copy_(saved.view())
    except Exception as error:
        return f"it cannot be copied: {error}"
    return ""


def _can_convert(saved: torch.dtype, own: torch.dtype) -> bool:
    """Return whether torch converts so without a loss of kind; masks were bytes once."""
    is_mask = own == torch.bool and not (saved.is_floating_point or saved.is_complex)
    return is_mask or torch.can_cast(saved, own)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _check_materialised(load: ModuleLoad) -> None:
    missing = set(load.missing_keys)
    if any(step.is_replaced and step.saved.device.type == "meta" for step in load.assignments):
        return  # as in the checkpoint
    if names := [slot.name for slot in tensor_slots(load.module) if slot.tensor.is_meta and slot.name not in missing]:
        raise LoadError(
            f"{', '.join(names[:20])}: computed by a hook of the module, and lost, for it is on the meta device; "
            "call module.to_empty() before"
        )
