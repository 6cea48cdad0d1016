"""The content of a checkpoint as load_state_dict gets it: with stand-ins in the place of its tensors."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rankload._checkpoint.entry import TensorEntry
from rankload._checkpoint.index import Index
from rankload._checkpoint.pickle_values import NotUnderstoodError, holds_unbuilt
from rankload._checkpoint.read_index import read_index
from rankload._deliver.failures import translated
from rankload._deliver.files import CheckpointFiles
from rankload._deliver.in_file import TensorInFile
from rankload._deliver.saved import Assignment, SavedTensor, TensorInMemory
from rankload._errors import LoadError, shown_key
from rankload.adapt import Adapter, is_lazy

_logger = logging.getLogger(__name__)

#: Under which keys training scripts save the optimizer: torch's tutorials, timm, fairseq, Lightning (a list).
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optimizer_states")

#: The last part of names of extra state in state dicts (torch/nn/modules/module.py, _EXTRA_STATE_KEY_SUFFIX).
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, with stand-ins in the place of all tensors.

    Attributes:
        whole: as saved.
        of_module: the state dict for the module: what the adapter has made of the whole.
        assignments: where the stand-ins note where they go.
        index: None where torch.load had to load all of it.
    """

    whole: Any
    of_module: OrderedDict[str, Any]
    assignments: list[Assignment]
    index: Index | None = None


def open_content(
    files: CheckpointFiles,
    adapter: Adapter,
    wanted: Collection[str],
    *,
    with_optimizer: bool,
    weights_only: bool,
    mmap: bool | None,
) -> Content:
    """Open a checkpoint for a module.

    Its index is read, and nothing else, where that will do. Where the format has no index, where the adapter may want
    to see the tensors themselves, or where the module wants an object that only torch.load builds, torch.load it is.

    Args:
        files: the checkpoint's.
        adapter: applied to the index's content, or to what was loaded.
        wanted: the names that the module has.
        with_optimizer: whether an optimizer's state is wanted, too.
        weights_only: for torch.load.
        mmap: for torch.load.

    Raises:
        LoadError: the file is broken, or holds no state dict.
    """
    assignments: list[Assignment] = []
    index = _read_index(files) if is_lazy(adapter) else None
    if index is not None:
        indexed = with_leaves(index.content, _in_file(index, files, assignments))
        try:
            found = adapter(indexed)
        except LoadError:
            if weights_only:
                raise
            found = None  # what it looks for may be in an object that only torch.load builds
        unbuilt = _unbuilt(found, wanted)
        if with_optimizer and isinstance(indexed, Mapping):
            unbuilt += _unbuilt(indexed, OPTIMIZER_KEYS)
        if found is not None and not unbuilt:
            return Content(indexed, _state_dict(found, files.shown, assignments), assignments, index)
        _logger.debug("%s is loaded by torch.load, for its objects: %s", files.shown, unbuilt)
    loaded = files.load(weights_only=weights_only, mmap=mmap)
    found = adapter(loaded)
    return Content(
        with_leaves(loaded, _in_memory(assignments)), _state_dict(found, files.shown, assignments), assignments
    )


def _read_index(files: CheckpointFiles) -> Index | None:
    """Return None where there is no index."""
    with translated(files.path, files.shown):
        try:
            return read_index(files.source(files.name), files.name, files.source, is_remote=False)
        except NotUnderstoodError as error:
            _logger.debug("%s is loaded by torch.load: %s", files.shown, error)
            return None


def _in_file(index: Index, files: CheckpointFiles, assignments: list[Assignment]) -> Callable[[Any], Any]:
    def stand_in(value: Any) -> Any:
        if not isinstance(value, TensorEntry):
            return value
        return TensorInFile(value, files, index.byte_orders[value.file], assignments, files.shown)

    return stand_in


def _in_memory(assignments: list[Assignment]) -> Callable[[Any], Any]:
    return lambda value: TensorInMemory(value, assignments) if isinstance(value, torch.Tensor) else value


def _state_dict(found: Any, shown: str, assignments: list[Assignment]) -> OrderedDict[str, Any]:
    """Return what the adapter has made, as load_state_dict is to have it.

    Raises:
        LoadError: it is no state dict.
    """
    if not isinstance(found, Mapping):
        raise LoadError(f"{shown}: holds no state dict, but a {type(found).__name__}", path=shown)
    if strange := [key for key in found if not isinstance(key, str)]:
        raise LoadError(f"{shown}: holds no state dict, for it has the key {shown_key(strange[0])}", path=shown)
    content: OrderedDict[str, Any] = with_leaves(
        OrderedDict(found), _in_memory(assignments), getattr(found, "_metadata", None)
    )
    for name, value in content.items():
        if _is_extra_state(name):
            # whatever set_extra_state expects, it is no stand-in
            content[name] = with_leaves(value, lambda part: part.view() if isinstance(part, SavedTensor) else part)
    return content


def with_leaves(
    content: Any, stand_in: Callable[[Any], Any], metadata: Any = None, made: dict[int, Any] | None = None
) -> Any:
    """Return nested content with other leaves; state dicts keep their module versions.

    Args:
        content: it; it may contain itself.
        stand_in: makes the leaves.
        metadata: module versions, for a state dict without.
        made: what has been made of containers already, by their ids: each may be in the content many times over.
    """
    made = {} if made is None else made
    if id(content) in made:
        return made[id(content)]
    result: Any
    if type(content) in (dict, OrderedDict):
        result = made[id(content)] = type(content)()
        result.update((name, with_leaves(value, stand_in, made=made)) for name, value in content.items())
        if type(content) is OrderedDict and (metadata := getattr(content, "_metadata", metadata)) is not None:
            result._metadata = metadata
        return result
    if type(content) is list:
        result = made[id(content)] = []
        result.extend(with_leaves(value, stand_in, made=made) for value in content)
        return result
    if type(content) is tuple:
        result = made[id(content)] = tuple(with_leaves(value, stand_in, made=made) for value in content)
        return result
    return stand_in(content)


def _unbuilt(found: Any, wanted: Collection[str]) -> list[str]:
    """Return the names of what is needed, and was not built."""
    if not isinstance(found, Mapping):
        return ["all"] if holds_unbuilt(found) else []
    return [
        name for name, value in found.items() if (name in wanted or _is_extra_state(str(name))) and holds_unbuilt(value)
    ]


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE
