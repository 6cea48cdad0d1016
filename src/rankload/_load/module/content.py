"""The content of a checkpoint, as load_state_dict gets it.

torch's own modules get lazy tensors, so that nothing is read before the checkpoint is known to fit. The user's own code
gets exactly the values that torch.load returns.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy as is_uninitialised

from rankload._formats.entry import TensorEntry
from rankload._formats.index import Index
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.read_index import read_index
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.exact import is_exact
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.lazy_tensor import Assignment, LazyTensor, MemoryTensor
from rankload._load.module.leaves import leaves, with_leaves
from rankload._load.module.module_versions import assigned_modules
from rankload._load.module.own_code import looks_at_state_dict
from rankload._load.module.remainder import OPTIMIZER_KEYS, Remainder, remainder_of_index, without_loaded
from rankload._load.module.slots import bare, tensor_slots
from rankload._load.values.torch_errors import wrap_load_errors
from rankload._load.values.torch_values import built
from rankload._text import shown_key
from rankload.adapt import Adapter, is_lazy
from rankload.errors import LoadError

_logger = logging.getLogger("rankload")

#: Last part of the names of extra state in state dicts (torch/nn/modules/module.py, _EXTRA_STATE_KEY_SUFFIX).
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class CheckpointContent:
    """The content of an opened checkpoint.

    Attributes:
        whole: saved content, with lazy tensors for all tensors; None if not needed.
        of_module: state dict for the module, from the adapter. Values that only torch's code reads are lazy tensors.
        assignments: list to which `NotedCopies` adds the steps of the load.
        found: the adapter's result, unchanged.
        index: index of the checkpoint; None if torch.load had to load all of it.
        remainder: values that belong to neither module nor optimizer; None if not needed.
    """

    whole: Any
    of_module: Mapping[str, Any]
    assignments: list[Assignment]
    found: Any
    index: Index | None = None
    remainder: Remainder | None = None

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """Tensors of the state dict that are not lazy."""
        return (value for value in leaves(self.of_module) if isinstance(value, torch.Tensor))


def open_content(
    files: CheckpointFiles,
    adapter: Adapter,
    module: nn.Module,
    *,
    with_optimizer: bool,
    assign: bool | None,
    weights_only: bool,
    mmap: bool | None,
) -> CheckpointContent:
    """Open a checkpoint for a module.

    If possible, only the index is read. Otherwise torch.load loads the whole file: for a format without an index, for
    an adapter that may read tensors, or for an object that only torch.load builds.

    Args:
        files: files of the checkpoint.
        adapter: applied to the index's content, or to the result of torch.load.
        module: target of the load.
        with_optimizer: whether the optimizer's state and the remainder are needed, too.
        assign: the caller's ``assign=``; with True the module gets the checkpoint's own tensors.
        weights_only: for torch.load.
        mmap: for torch.load.

    Raises:
        LoadError: the file is broken, or holds no state dict.
    """
    content = None
    if is_lazy(adapter) and (index := _read_index(files)) is not None:
        content = _of_index(
            index, files, adapter, module, with_optimizer=with_optimizer, assign=assign, weights_only=weights_only
        )
        if content is not None and with_optimizer:
            remainder = remainder_of_index(index, content.whole, content.found, files, weights_only=weights_only)
            content = replace(content, remainder=remainder)
        if content is not None and (content.remainder is not None or not with_optimizer):
            return content
    try:
        loaded = files.load(weights_only=weights_only, mmap=mmap)
    except LoadError as error:
        if content is None:
            raise
        return replace(content, remainder=Remainder(error=error))  # raised only when the caller asks for the remainder
    return _of_loaded(loaded, files, adapter, with_optimizer=with_optimizer)


def _of_index(
    index: Index,
    files: CheckpointFiles,
    adapter: Adapter,
    module: nn.Module,
    *,
    with_optimizer: bool,
    assign: bool | None,
    weights_only: bool,
) -> CheckpointContent | None:
    """Return the content without its remainder; None if torch.load has to build a part of it."""
    assignments: list[Assignment] = []
    whole = with_leaves(index.content, _in_file(index, files, assignments))
    try:
        found = adapter(whole)
    except LoadError:
        if weights_only:
            raise
        return None  # the adapter may look for something in an object that only torch.load builds
    is_looked_at = looks_at_state_dict(bare(module)[0])
    is_copied = not (assign or is_looked_at or assigned_modules(found))
    wanted = _wanted(found, module, is_looked_at=is_looked_at)
    unbuilt = [name for name, value in wanted.items() if not _suffices(name, value, index, is_copied=is_copied)]
    if with_optimizer and isinstance(whole, Mapping):
        optimizers = [key for key in OPTIMIZER_KEYS if key in whole]
        unbuilt += [key for key in optimizers if not (index.is_exact and is_exact(whole[key]))]
    if unbuilt:
        _logger.debug("%s is loaded by torch.load, for its objects: %s", files.display_name, unbuilt)
        return None
    of_module = _with_exact_values(_checked(found, files.display_name), wanted, is_looked_at=is_looked_at)
    return CheckpointContent(whole, of_module, assignments, found, index)


def _of_loaded(loaded: Any, files: CheckpointFiles, adapter: Adapter, *, with_optimizer: bool) -> CheckpointContent:
    assignments: list[Assignment] = []
    found = adapter(loaded)
    of_module = _checked(found, files.display_name)
    if not with_optimizer:
        return CheckpointContent(None, of_module, assignments, found)
    whole = with_leaves(loaded, _in_memory(assignments))
    return CheckpointContent(whole, of_module, assignments, found, remainder=Remainder(without_loaded(loaded, found)))


def _read_index(files: CheckpointFiles) -> Index | None:
    """Return the index of a checkpoint; None if the format has none."""
    with wrap_load_errors(files.path, files.display_name):
        try:
            return read_index(files.source(files.name), files.name, files.source, is_remote=False)
        except NotUnderstoodError as error:
            _logger.debug("%s is loaded by torch.load: %s", files.display_name, error)
            return None


def _in_file(index: Index, files: CheckpointFiles, assignments: list[Assignment]) -> Callable[[Any], Any]:
    made: dict[int, FileTensor] = {}

    def stand_in(value: Any) -> Any:
        if not isinstance(value, TensorEntry):
            return built(value)
        if id(value) not in made:
            made[id(value)] = FileTensor(value, files, index.byte_orders[value.file], assignments, files.display_name)
        return made[id(value)]

    return stand_in


def _in_memory(assignments: list[Assignment]) -> Callable[[Any], Any]:
    def stand_in(value: Any) -> Any:
        has_shape = isinstance(value, torch.Tensor) and not (is_uninitialised(value) or value.is_nested)
        return MemoryTensor(value, assignments) if has_shape else value

    return stand_in


def _checked(found: Any, display_name: str) -> Mapping[str, Any]:
    """Return the adapter's result, if it is a state dict.

    Raises:
        LoadError: the result is something else.
    """
    if not isinstance(found, Mapping):
        raise LoadError(f"{display_name}: holds no state dict, but a {type(found).__name__}", path=display_name)
    if strange := [key for key in found if not isinstance(key, str)]:
        raise LoadError(
            f"{display_name}: holds no state dict, for it has the key {shown_key(strange[0])}", path=display_name
        )
    return found


def _wanted(found: Any, module: nn.Module, *, is_looked_at: bool) -> Mapping[Any, Any]:
    """Return the values that the module will read, by name: its tensors and extra state, or everything."""
    if is_looked_at or not isinstance(found, Mapping):
        return found if isinstance(found, Mapping) else {"all": found}
    inner, prefix = bare(module)
    own = {slot.name for slot in tensor_slots(inner)}
    return {
        name: value
        for name, value in found.items()
        if _is_extra_state(str(name)) or str(name).removeprefix(prefix) in own
    }


def _suffices(name: str, value: Any, index: Index, *, is_copied: bool) -> bool:
    """Return whether a value from the index serves as well as the value from torch.load."""
    if isinstance(value, LazyTensor) and not _is_extra_state(str(name)) and (is_copied or value.is_plain):
        return True  # a copy of the elements does not depend on the tensor's class
    return index.is_exact and is_exact(value)


def _with_exact_values(
    state_dict: Mapping[str, Any], wanted: Mapping[Any, Any], *, is_looked_at: bool
) -> Mapping[str, Any]:
    """Return the state dict, in which all values that the user's code sees are what torch.load returns."""
    content: Any = copy.copy(state_dict) if isinstance(state_dict, dict) else OrderedDict(state_dict)
    made: dict[int, Any] = {}
    for name in wanted:
        if is_looked_at or _is_extra_state(name):
            content[name] = with_leaves(
                state_dict[name], lambda part: part.exact() if isinstance(part, LazyTensor) else part, made
            )
    return content  # type: ignore[no-any-return]


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE
