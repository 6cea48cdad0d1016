"""The named tensor slots of a module, and this rank's region of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankload._load.module.regions import Region, whole


@dataclass(frozen=True, slots=True, eq=False)
class TensorSlot:
    """One name of a parameter or persistent buffer.

    Attributes:
        name: name in ``state_dict()``.
        owner: module that has the tensor as an attribute.
        leaf: name of that attribute.
        tensor: current tensor.
    """

    name: str
    owner: nn.Module
    leaf: str
    tensor: torch.Tensor

    def replace(self, tensor: torch.Tensor) -> None:
        """Put another tensor into the slot: a Parameter for a Parameter."""
        if self.leaf in self.owner._parameters:
            self.owner._parameters[self.leaf] = tensor  # type: ignore[assignment]
        else:
            self.owner._buffers[self.leaf] = tensor


def bare(module: nn.Module) -> tuple[nn.Module, str]:
    """Remove wrappers that add a prefix to the names in a state dict.

    Returns:
        The module inside DistributedDataParallel, DataParallel or torch.compile, and the prefix.
    """
    prefix = ""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module, prefix = module.module, f"{prefix}module."
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module, prefix = inner, f"{prefix}_orig_mod."
        else:
            return module, prefix


def tensor_slots(module: nn.Module) -> list[TensorSlot]:
    """Return a slot for every name of the module's parameters and persistent buffers. Tied tensors have several."""
    found: list[TensorSlot] = []
    _add_slots(found, module, "", is_persistent=True)
    return found


def non_persistent_meta_buffers(module: nn.Module) -> list[str]:
    """Return the names of non-persistent buffers on the meta device."""
    found: list[TensorSlot] = []
    _add_slots(found, module, "", is_persistent=False)
    return [slot.name for slot in found if slot.tensor.is_meta]


def _add_slots(found: list[TensorSlot], owner: nn.Module, prefix: str, *, is_persistent: bool) -> None:
    """Add slots in the order of state_dict(). Not a generator, which would pass each slot up through all parents."""
    if is_persistent:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                found.append(TensorSlot(prefix + leaf, owner, leaf, parameter))
    for leaf, buffer in owner._buffers.items():
        if buffer is not None and (leaf not in owner._non_persistent_buffers_set) == is_persistent:
            found.append(TensorSlot(prefix + leaf, owner, leaf, buffer))
    for name, child in owner._modules.items():
        if child is not None:
            _add_slots(found, child, f"{prefix}{name}.", is_persistent=is_persistent)


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of the module's tensors, ignoring meta tensors; None if there are no or several devices."""
    devices = {slot.tensor.device for slot in tensor_slots(module) if not slot.tensor.is_meta}
    return devices.pop() if len(devices) == 1 else None


def has_its_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's storage contains all its elements: a raw write must not go beyond the storage."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.is_meta:
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Region]:
    """Return this rank's local part of a tensor, and the region of that part.

    Raises:
        ValueError: a placement is ``Partial`` (ranks hold summands), or the part is not one region, or its shape does
            not follow from the placements.
    """
    if not is_distributed(tensor):
        # no detach(): a copy sets the scale of a quantised tensor, or the indices of a sparse one, on the tensor itself
        is_more = tensor.is_quantized or tensor.layout != torch.strided
        return tensor if is_more else tensor.detach(), whole(tuple(tensor.shape))
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as torch's own checkpoints do

    distributed: Any = tensor
    if any(isinstance(placement, Partial) for placement in distributed.placements):
        raise ValueError("it has a Partial placement, whose parts cannot be loaded")
    if not _is_one_region(distributed.placements):
        raise ValueError(f"its placements {distributed.placements} give this rank rows from several places")
    local = distributed._local_tensor.detach()
    if local.numel() == 0:
        return local, Region(
            (0,) * tensor.ndim, tuple(local.shape) if local.ndim == tensor.ndim else (0,) * tensor.ndim
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, distributed.device_mesh, distributed.placements)
    if tuple(shape) != tuple(local.shape):
        raise ValueError(f"its local part has the shape {list(local.shape)}, but its placements give {list(shape)}")
    return local, Region(tuple(offset), tuple(shape))


def holds_plain_elements(tensor: torch.Tensor) -> bool:
    """Return whether the elements are stored unchanged and in order, so that raw writes to the memory are right."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_plain and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _is_one_region(placements: Sequence[Any]) -> bool:
    """Return whether a rank's part is one region: a strided shard must be sharded again, as in FSDP with TP."""
    kinds = [(type(placement).__name__, getattr(placement, "dim", None)) for placement in placements]
    return all(("Shard", dim) in kinds[at + 1 :] for at, (kind, dim) in enumerate(kinds) if kind == "_StridedShard")


def empty_copy(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor for the same part. A DTensor stays on its mesh's kind of device."""
    if not is_distributed(tensor):
        return torch.empty_like(tensor, device=device, dtype=dtype, requires_grad=False)
    from torch.distributed.tensor import DTensor

    distributed: Any = tensor
    mesh = distributed.device_mesh
    local = torch.empty_like(
        distributed._local_tensor,
        device=device if device.type == mesh.device_type else mesh.device_type,
        dtype=dtype,
        requires_grad=False,
    )
    return DTensor.from_local(
        local, mesh, distributed.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def is_distributed(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    # not isinstance(): an import of torch.distributed.tensor takes long
    return type(tensor) is not torch.Tensor and hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def is_replicated(tensor: torch.Tensor) -> bool:
    """Return whether each rank has the whole tensor: a plain tensor, or a DTensor that is replicated everywhere."""
    distributed: Any = tensor
    return not is_distributed(tensor) or all(placement.is_replicate() for placement in distributed.placements)


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is strided, of torch's own class, and has data. Such tensors can be copied freely."""
    is_known = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta
    return is_known and tensor.layout == torch.strided and not tensor.is_quantized


def as_parameter_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a Parameter if ``like`` is a Parameter, as load_state_dict(assign=True) does."""
    if not isinstance(like, nn.Parameter):
        return tensor
    if isinstance(tensor, nn.Parameter):  # keep its class, which may be a subclass
        return tensor.requires_grad_(like.requires_grad)
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
