"""Choose the device for a rank's tensors, and the map_location that puts them there.

Nothing here creates a context on an accelerator: devices are counted and named, not used.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rankload._types import Identity
from rankload.errors import ArgumentError, DeviceError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Accelerators whose names torch knows only after an import of their extension (torch_npu, torch_mlu, torch_musa).
#: Files saved on them also reach hosts without the extension.
_OUT_OF_TREE = ("npu", "mlu", "musa")

#: Accelerators for which torch itself has a module of that name.
_KINDS = ("cuda", "xpu", "mps", "mtia")

_PLACEHOLDERS = ("device", "local_rank", "rank")


class Placement(dict[Any, Any]):
    """A ``map_location`` that maps the location tags of storages on first use.

    It is a dict, although an empty one: torch.load accepts no function for wrapper subclasses, or under FakeTensorMode.

    Args:
        device_of: returns the device for a tag, or None for torch's own choice.
    """

    def __init__(self, device_of: Callable[[str], torch.device | None]) -> None:
        super().__init__()
        self.device_of = device_of

    def get(self, tag: Any, default: Any = None) -> Any:
        """Return the location for a tag. For a wrapper subclass, torch passes a torch.device and gets one back."""
        device = self.device_of(str(tag))
        if device is None:
            return default
        return device if isinstance(tag, torch.device) else str(device)


@dataclass(frozen=True)
class Accelerator:
    """Torch's facts about this process's accelerator.

    Attributes:
        type: ``"cuda"``, ``"xpu"``, ``"npu"``, …
        count: number of devices that this process sees, at least 1.
        current_index: the current device; 0 unless initialised.
        is_initialized: whether this process has used it.
    """

    type: str
    count: int
    current_index: int
    is_initialized: bool


def own_device(identity: Identity, group: ProcessGroup | None = None) -> torch.device:
    """Return this rank's own accelerator, or the CPU where there is none.

    Raises:
        DeviceError: several devices are visible, and none of them is known to be this rank's.
    """
    if identity.local_rank is None and dist.is_available() and dist.is_initialized() and dist.get_rank() == 0:
        # processes spawned without a launcher: the first rank of the job is also the first on its node
        identity = replace(identity, local_rank=0)
    return choose_device(visible_accelerator(), identity, _bound_device(group))


def choose_device(
    accelerator: Accelerator | None, identity: Identity, bound: torch.device | None = None
) -> torch.device:
    """Choose a rank's own device, from the surest sign to the weakest.

    1. the device that the process group is bound to (``init_process_group(device_id=…)``);
    2. the CPU if there is no accelerator;
    3. the current device, if the accelerator is in use and the device is not 0, which is the default of every process;
    4. the only visible device (``srun --gpus-per-task``, CUDA_VISIBLE_DEVICES), whatever the local rank;
    5. the device with the local rank's number.

    Raises:
        DeviceError: the local rank is unknown, or has no device.
    """
    if bound is not None:
        return bound
    if accelerator is None:
        return torch.device("cpu")
    kind = accelerator.type
    if accelerator.is_initialized and accelerator.current_index != 0:
        return torch.device(kind, accelerator.current_index)
    if accelerator.count == 1:
        return torch.device(kind, 0)
    if identity.local_rank is not None and identity.local_rank < accelerator.count:
        return torch.device(kind, identity.local_rank)
    raise DeviceError(
        f"no {kind} device is known to belong to rank {identity.rank} on {identity.host}: {_seen(accelerator)} and "
        + (
            f"{identity.launcher} sets no local rank. Set LOCAL_RANK"
            if identity.local_rank is None
            else f"local rank {identity.local_rank} has none. Start at most {accelerator.count} ranks on this node"
        )
        + ", or select a device before this call (torch.accelerator.set_device_index, or device_id= of "
        'init_process_group), or pass map_location="cpu" or an explicit device',
        device_type=kind,
        count=accelerator.count,
        local_rank=identity.local_rank,
    )


def visible_accelerator() -> Accelerator | None:
    """Ask torch for the accelerator that this process sees, without initialising it."""
    try:
        device = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6 raises where later releases return None
        device = None
    if device is None:
        return None
    module = torch.get_device_module(device)
    # not torch.accelerator.is_available(): on CUDA it makes forks unsafe; counting devices by NVML does not
    count = module.device_count()
    if count == 0:
        return None
    is_initialized = hasattr(module, "is_initialized") and bool(module.is_initialized())  # mps has no such state
    # a query for the current device would initialise the accelerator
    current_index = torch.accelerator.current_device_index() if is_initialized else 0
    return Accelerator(device.type, count, current_index, is_initialized)


def resolve_map_location(map_location: Any, identity: Identity, group: ProcessGroup | None = None) -> Any:
    """Return a map_location for torch.load that suits this rank.

    ``None`` moves storages saved on an accelerator to this rank's own device: always in a job; in a single process,
    only if the device in the file does not exist here. Storages saved on the CPU stay on the CPU. The device is looked
    up at the first storage that needs it, so files of CPU tensors need no device.

    Strings, alone or as values of a dict, may contain ``{device}`` (the rank's own device, as ``cuda:3`` or ``cpu``),
    ``{local_rank}`` and ``{rank}``. All other values mean what they mean to torch.load. A dict may also have
    torch.devices as values. Storages whose tags a dict lacks are restored where they were saved, as in torch.

    Raises:
        ArgumentError: an unknown placeholder.
        DeviceError: a placeholder has no value here, or the result names no device of this process.
    """
    if map_location is None:
        own = functools.cache(lambda: own_device(identity, group))
        return _placement_in_job(own) if _has_other_ranks(identity) else _placement_in_single_process(own)
    if isinstance(map_location, (str, torch.device)):
        location = _fill(map_location, identity, group) if isinstance(map_location, str) else map_location
        _check_kind_exists(str(location))
        return location
    if isinstance(map_location, dict):
        return {tag: _fill(str(location), identity, group) for tag, location in map_location.items()}
    return map_location


def _has_other_ranks(identity: Identity) -> bool:
    # a call of one rank (of a group of one, say) may have other ranks on its node
    is_grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return identity.world_size > 1 or (identity.local_world_size or 1) > 1 or is_grouped


def _placement_in_job(own: Callable[[], torch.device]) -> Placement:
    # no own device for the CPU, meta, and the tags of torch.serialization.register_package
    return Placement(functools.cache(lambda tag: own() if _accelerator_of(tag) else None))


def _placement_in_single_process(own: Callable[[], torch.device]) -> Placement:
    def device_of(tag: str) -> torch.device | None:
        kind = _accelerator_of(tag)
        return None if kind is None or _exists(kind, tag) else own()

    return Placement(functools.cache(device_of))


_TAG = re.compile(r"([a-z][a-z_]*):?\d*")


def _accelerator_of(tag: str) -> str | None:
    """Return the device type of a location tag (``cuda:1``, ``mps``, old ``cuda1``) if it names an accelerator."""
    parsed = _TAG.fullmatch(tag)
    if parsed is None or parsed[1] in ("cpu", "meta"):
        return None
    kind = parsed[1]
    if kind in _OUT_OF_TREE:
        return kind
    try:
        torch.device(kind)
    except RuntimeError:
        return None
    return kind


def _exists(kind: str, tag: str) -> bool:
    module: Any = getattr(torch, kind, None)
    index = re.search(r"\d+$", tag)
    count: int = module.device_count() if hasattr(module, "device_count") else 0
    return int(index[0] if index else 0) < count


def _fill(template: str, identity: Identity, group: ProcessGroup | None) -> str:
    if "{" not in template and "}" not in template:
        return template

    def value_of(placeholder: re.Match[str]) -> str:
        name = placeholder[1]
        if name == "device":
            return str(own_device(identity, group))
        if name == "rank":
            return str(identity.rank)
        if name != "local_rank":
            raise ArgumentError(f"map_location={template!r}: {placeholder[0]} is unknown; {_known()}", value=template)
        if identity.local_rank is None:
            raise DeviceError(
                f"map_location={template!r}: {identity.launcher} sets no local rank for rank {identity.rank} on "
                f'{identity.host}. Set LOCAL_RANK, or pass "{{device}}" or an explicit device',
                map_location=template,
            )
        return str(identity.local_rank)

    location = re.sub(r"\{([^{}]*)\}", value_of, template)
    if "{" in location or "}" in location:
        raise ArgumentError(f"map_location={template!r}: unbalanced braces; {_known()}", value=template)
    _check_exists(location, template, identity)
    return location


def _check_exists(location: str, template: str, identity: Identity) -> None:
    """Raise DeviceError for a device that does not exist. torch's error would not explain why.

    A local rank is no device index if each task sees only its own device.
    """
    accelerator = visible_accelerator()
    kind, _, index = location.partition(":")
    if accelerator is None or kind != accelerator.type or not index.isdecimal() or int(index) < accelerator.count:
        return
    raise DeviceError(
        f"map_location={template!r} gives {location} for rank {identity.rank} on {identity.host}, but "
        f'{_seen(accelerator)}. Pass "{{device}}", which also works if each task sees only its own device',
        map_location=template,
        device=location,
        count=accelerator.count,
    )


def _check_kind_exists(location: str) -> None:
    """Check that this process has an accelerator of the requested kind. torch's error would blame the file.

    Raises:
        DeviceError: there is no such accelerator.
    """
    kind = location.partition(":")[0]
    accelerator = visible_accelerator()
    if accelerator is not None and accelerator.type == kind:
        return
    is_known = kind in _KINDS and torch._guards.detect_fake_mode() is None  # fake tensors need no device
    if is_known and not (torch.backends.mps if kind == "mps" else getattr(torch, kind)).is_available():
        raise DeviceError(
            f"map_location={location!r}: this process has no {kind} device (torch finds none). "
            'Pass "cpu", or "{device}": this rank\'s own device, or the CPU where there is none',
            map_location=location,
            device=location,
            count=0,
        )


def _known() -> str:
    return "known placeholders: " + ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)


def _seen(accelerator: Accelerator) -> str:
    plural = "device" if accelerator.count == 1 else "devices"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = f" (CUDA_VISIBLE_DEVICES={visible})" if accelerator.type == "cuda" and visible is not None else ""
    return f"this process sees {accelerator.count} {accelerator.type} {plural}{limit}"


def _bound_device(group: ProcessGroup | None) -> torch.device | None:
    if not dist.is_available() or not dist.is_initialized():
        return None
    # a subgroup may lack a bound device, but the default group's device is right: the process is the same
    for candidate in (group, dist.group.WORLD):
        device = getattr(candidate, "bound_device_id", None)
        if isinstance(device, torch.device):
            return device
    return None
