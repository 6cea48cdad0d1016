"""The content of a checkpoint as load_state_dict gets it: with stand-ins in the place of its tensors."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rankload._checkpoint.entry import TensorEntry
from rankload._checkpoint.index import Index
from rankload._checkpoint.pickle_values import NotUnderstoodError, Unbuilt
from rankload._checkpoint.read_index import read_index
from rankload._deliver.failures import translated
from rankload._deliver.files import CheckpointFiles
from rankload._deliver.read import read_checkpoint
from rankload._deliver.saved import Assignment, SavedTensor, TensorInFile, TensorInMemory
from rankload._errors import LoadError
from rankload.adapt import Adapter, looks_at_names_only

_logger = logging.getLogger(__name__)

#: How names of extra state end in state dicts (torch/nn/modules/module.py, _EXTRA_STATE_KEY_SUFFIX).
_EXTRA_STATE = "_extra_state"


def stand_ins(
    path: Path,
    adapter: Adapter,
    wanted: Collection[str],
    closing: ExitStack,
    *,
    weights_only: bool,
    mmap: bool | None,
) -> tuple[OrderedDict[str, Any], list[Assignment]]:
    """Open a checkpoint for a module.

    Its index is read, and nothing else, where that will do. Where the format has no index, where the adapter may want
    to see the tensors themselves, or where the module wants an object that only torch.load builds, torch.load it is.

    Args:
        path: the file.
        adapter: applied to the index's content, or to what was loaded.
        wanted: the names that the module has.
        closing: closes the file when all is read.
        weights_only: for torch.load.
        mmap: for torch.load.

    Returns:
        The content, and the list in which its stand-ins note where they go.

    Raises:
        LoadError: the file is broken, or holds no state dict.
    """
    assignments: list[Assignment] = []
    content = _indexed(path, adapter, wanted, closing, assignments)
    if content is None:
        loaded = adapter(read_checkpoint(path, "cpu", weights_only=weights_only, mmap=mmap))
        content = _replaced(
            _checked(loaded, path),
            lambda value: TensorInMemory(value, assignments) if isinstance(value, torch.Tensor) else value,
        )
    for name, value in content.items():
        if name.endswith(_EXTRA_STATE) and isinstance(value, SavedTensor):
            content[name] = value.view()  # whatever set_extra_state expects, it is no stand-in
    return content, assignments


def _indexed(
    path: Path, adapter: Adapter, wanted: Collection[str], closing: ExitStack, assignments: list[Assignment]
) -> OrderedDict[str, Any] | None:
    """Return the content with stand-ins for what the index says, or None where the index will not do."""
    if not looks_at_names_only(adapter):
        return None
    files = CheckpointFiles(path.parent, closing)
    with translated(path):
        try:
            index = read_index(files.source(path.name), path.name, files.source, is_remote=False)
        except NotUnderstoodError as error:
            _logger.debug("%s is loaded by torch.load: %s", path, error)
            return None
    found = adapter(index.content)
    if not isinstance(found, Mapping) and _holds_unbuilt(found):
        return None
    content = _checked(found, path)
    unbuilt = [name for name, value in content.items() if _is_wanted(name, wanted) and _holds_unbuilt(value)]
    if unbuilt:
        _logger.debug("%s is loaded by torch.load, for its objects: %s", path, unbuilt)
        return None
    return _replaced(content, lambda value: _stand_in(value, index, files, assignments, path))


def _stand_in(value: Any, index: Index, files: CheckpointFiles, assignments: list[Assignment], path: Path) -> Any:
    if not isinstance(value, TensorEntry):
        return value
    return TensorInFile(value, files, index.byte_orders[value.file], assignments, str(path))


def _replaced(content: Mapping[str, Any], stand_in: Callable[[Any], Any]) -> OrderedDict[str, Any]:
    """Return a state dict of other values, with its module versions."""
    result = OrderedDict((name, stand_in(value)) for name, value in content.items())
    if (metadata := getattr(content, "_metadata", None)) is not None:
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _checked(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise LoadError(f"{path}: holds no state dict, but a {type(content).__name__}", path=str(path))
    if strange := [key for key in content if not isinstance(key, str)]:
        raise LoadError(f"{path}: holds no state dict, for it has the key {strange[0]!r}", path=str(path))
    return content


def _is_wanted(name: str, wanted: Collection[str]) -> bool:
    return name in wanted or name.endswith(_EXTRA_STATE)


def _holds_unbuilt(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_unbuilt, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_unbuilt, value))
    return isinstance(value, Unbuilt)
