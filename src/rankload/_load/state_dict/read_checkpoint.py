"""Read a local checkpoint into this process as `torch.load` would, whatever its format and name.

On the CPU the tensors are views of the mapped file, so the ranks of one host share its pages. A write to a tensor
copies the page first (MAP_PRIVATE), and never reaches the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankload._cache.files import retry_if_stale
from rankload._coordination.launchers import identity_from_environment
from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.sharded import read_weight_map
from rankload._formats.sniff import CHECKPOINT_FORMATS, describe, sniff
from rankload._formats.source import LocalSource
from rankload._formats.unpack import unpacked
from rankload._load.device.map_location import Restore, goes_by_tags, restore_of
from rankload._load.device.readers import Limits
from rankload._load.state_dict.deferred_storages import DeferredStorages
from rankload._load.state_dict.plain_checkpoint import PlainCheckpoint
from rankload._load.state_dict.private_mapping import torch_maps_privately
from rankload._load.state_dict.read_safetensors import read_safetensors
from rankload._load.state_dict.torch_load_checks import checked_for_torch, why_not_mapped
from rankload._load.values.torch_errors import wrap_load_errors
from rankload._platform.scratch import descriptor_path
from rankload._settings import Settings
from rankload._text import printable

_logger = logging.getLogger("rankload")


def read_checkpoint(
    path: str | os.PathLike[str],
    map_location: Any = None,
    *,
    weights_only: bool | None = True,
    mmap: bool | None = None,
    limits: Limits | None = None,
    check_cancelled: Callable[[], None] = lambda: None,
    display_name: str | None = None,
    fill: Callable[[DeferredStorages], None] | None = None,
    **torch_load_arguments: Any,
) -> Any:
    """Load a checkpoint, with the same result as ``torch.load``. Not collective.

    Args:
        path: path of the file. The format is detected by content, never by name.
        map_location: any form that torch.load takes, already resolved for this rank.
        weights_only: as for torch.load; True refuses everything but tensors and plain containers.
        mmap: None or True maps the file if its format allows it (torch's zip, safetensors). False makes private copies,
            for files that may be truncated or rewritten while they are in use.
        limits: number of reader threads for accelerators, and longest time without progress.
        check_cancelled: called repeatedly while those threads wait for a file; an error that it raises ends the wait.
        display_name: name of the file in messages; default: its path.
        fill: takes storages on accelerators that are still empty, by file of the checkpoint; default: fill them.
        **torch_load_arguments: passed to torch.load (``pickle_module``, ``encoding``, …).

    Raises:
        UnsafePickleError: ``weights_only`` refused the file.
        LoadError: the file could not be loaded for another reason.
    """
    path = Path(path)
    limits = limits or Limits.of(identity_from_environment(), Settings.from_environment())
    display_name = printable(display_name or str(path))
    options = _Options(weights_only, mmap, limits, check_cancelled, display_name, fill, torch_load_arguments)

    with wrap_load_errors(path, display_name):
        return retry_if_stale(lambda: _read(path, map_location, options))


@dataclass(frozen=True)
class _Options:
    """The arguments of `read_checkpoint`."""

    weights_only: bool | None
    mmap: bool | None
    limits: Limits
    check_cancelled: Callable[[], None]
    display_name: str
    fill: Callable[[DeferredStorages], None] | None
    torch_load_arguments: dict[str, Any]

    def may_be_built(self, map_location: Any) -> bool:
        """Return whether a plain checkpoint may be built from its index: no argument asks for torch.load itself."""
        # torch.load gives storages on the meta device an attribute with their offset in the file
        return self.mmap is not False and not self.torch_load_arguments and str(map_location) != "meta"


def _read(path: Path, map_location: Any, options: _Options) -> Any:
    file_format = sniff(path)
    if file_format not in CHECKPOINT_FORMATS:
        # torch.load would take the file for a pickle, and fail with a message about weights_only
        raise BrokenFileError(f"expected a checkpoint, got {describe(path)}")
    if file_format == "single_member_zip":
        with unpacked(path) as descriptor:
            return _read(Path(descriptor_path(descriptor)), map_location, options)
    if file_format == "sharded":
        return _read_parts(path, map_location, options)
    if file_format == "safetensors":
        is_mapped = options.mmap is not False
        with _restore(map_location, options, may_defer=is_mapped) as restore:
            return read_safetensors(path, restore, mmap=is_mapped, display_name=options.display_name)
    with path.open("rb", buffering=0) as file:
        source = LocalSource(file.fileno())
        if file_format == "torch_zip" and options.may_be_built(map_location):
            try:
                plain = PlainCheckpoint(source, options.display_name)
            except NotUnderstoodError as error:
                _logger.debug("%s is not built from its index: %s", options.display_name, error)
            else:
                with _restore(map_location, options, may_defer=True) as restore:
                    return plain.build(restore)
        checked = checked_for_torch(source, file_format, map_location)
        is_mapped = not (reason := why_not_mapped(source, file_format, checked.doubt)) and options.mmap is not False
    if reason and options.mmap is not False:
        level = logging.INFO if options.mmap else logging.DEBUG
        _logger.log(level, "%s is read, not mapped: %s", options.display_name, reason)
    with _name_for_torch(path) as name, torch_maps_privately() if is_mapped else contextlib.nullcontext():
        return torch.load(
            name,
            checked.map_location,
            weights_only=options.weights_only,
            mmap=is_mapped,
            **options.torch_load_arguments,
        )


@contextlib.contextmanager
def _restore(map_location: Any, options: _Options, *, may_defer: bool) -> Iterator[Restore]:
    """Yield the function that moves storages to their devices. Fill accelerators after the block, if allowed."""
    if not may_defer or not goes_by_tags(map_location):  # a function of the caller may look at the storages' bytes
        yield restore_of(map_location)
        return
    deferred = DeferredStorages(map_location)
    yield deferred
    if options.fill is not None:
        options.fill(deferred)
    else:
        deferred.fill(options.limits, options.check_cancelled, options.display_name)


def _read_parts(path: Path, map_location: Any, options: _Options) -> dict[str, Any]:
    """Read the state dicts of several files, and merge them in the order of the index."""
    with path.open("rb", buffering=0) as file:
        weight_map = read_weight_map(LocalSource(file.fileno()))
    paths = {name: path.parent / name for name in dict.fromkeys(weight_map.values())}  # in one order on all ranks
    if strange := [name for name, part in paths.items() if sniff(part) == "sharded"]:
        raise BrokenFileError(f"index of a sharded checkpoint with another index as a part: {strange[0]!r}")
    parts = {
        name: read_checkpoint(
            part,
            map_location,
            weights_only=options.weights_only,
            mmap=options.mmap,
            limits=options.limits,
            check_cancelled=options.check_cancelled,
            display_name=str(Path(options.display_name).parent / name),
            fill=options.fill,
            **options.torch_load_arguments,
        )
        for name, part in paths.items()
    }
    try:
        return {tensor: parts[name][tensor] for tensor, name in weight_map.items()}
    except (KeyError, TypeError) as error:
        raise BrokenFileError(f"index of a sharded checkpoint whose parts lack a tensor: {error}") from None


@contextlib.contextmanager
def _name_for_torch(path: Path) -> Iterator[str]:
    """Yield a name that torch.load can open, and whose format it detects by content.

    From 2.13 on, torch.load passes ``*.safetensors`` to another reader. It cannot open names that are not UTF-8.
    """
    if path.suffix != ".safetensors" and printable(str(path)) == str(path):
        yield str(path)
        return
    with path.open("rb") as file:
        yield descriptor_path(file.fileno())
