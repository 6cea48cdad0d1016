"""The rest of a training checkpoint besides module and optimizer: epoch, schedulers, random states."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.index import Index
from rankload._formats.pickle_values import Unbuilt
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.exact import is_exact
from rankload._load.module.lazy_tensor import ConvertedTensor, LazyTensor
from rankload._load.module.leaves import leaves, with_leaves
from rankload.adapt import WRAPPERS
from rankload.errors import LoadError

#: Keys under which training scripts save the optimizer: torch's tutorials, timm, fairseq, Lightning (a list).
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optimizer_states")


@dataclass(frozen=True)
class Remainder:
    """The rest of a checkpoint, or the error of loading it.

    Attributes:
        content: the rest.
        error: why the rest could not be loaded; None if it was.
    """

    content: Any = None
    error: LoadError | None = None


def optimizer_key(whole: Mapping[Any, Any]) -> str | None:
    """Return the key of the optimizer's state dict; None if there is none."""
    for key in OPTIMIZER_KEYS:
        found = whole.get(key)
        if isinstance(found, (list, tuple)) and len(found) == 1:
            found = found[0]
        if isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys():
            return key
    return None


def without_loaded(whole: Any, of_module: Any) -> Any:
    """Return a checkpoint without the parts of the module and the optimizer.

    Args:
        whole: content of the checkpoint, with tensors or lazy tensors.
        of_module: the adapter's result.
    """
    if not isinstance(whole, Mapping):
        return whole
    rest: Any = copy.copy(whole)
    for key in {*_keys_of_module(whole, of_module), optimizer_key(whole)} - {None}:
        del rest[key]
    return rest


def remainder_of_index(
    index: Index, indexed: Any, of_module: Any, files: CheckpointFiles, *, weights_only: bool
) -> Remainder | None:
    """Return the remainder from an index; None if only torch.load can build tensors of the remainder.

    Args:
        index: index of the checkpoint.
        indexed: content of the index, with lazy tensors.
        of_module: the adapter's result.
        files: files of the checkpoint.
        weights_only: for torch.load, which builds other objects without reading tensors.
    """
    if not isinstance(indexed, dict):
        return Remainder()  # such a checkpoint has no optimizer, either
    rest = without_loaded(indexed, of_module)
    if not index.is_exact or _hides_tensors(rest):
        return None
    if is_exact(rest):
        return Remainder(_with_tensors(rest))
    try:
        loaded = files.load_structure(weights_only=weights_only)
    except LoadError as error:
        return Remainder(error=error)
    for key in [key for key in loaded if key not in rest]:
        del loaded[key]
    return Remainder(_filled(loaded, _with_tensors(rest), {}))


def _keys_of_module(whole: Mapping[Any, Any], of_module: Any) -> list[Any]:
    """Return the keys of the module's tensors: as few keys as contain all of them."""
    for key, value in whole.items():
        if value is of_module:
            return [key]
    missing = set(_identities(of_module))
    found = []
    for key, value in whole.items():
        if isinstance(value, Mapping) and missing and not missing.isdisjoint(here := set(_identities(value))):
            missing -= here
            found.append(key)
    return found or [key for key in WRAPPERS if isinstance(whole.get(key), Mapping)][:1]


def _identities(content: Any) -> Iterator[int]:
    for value in leaves(content):
        if isinstance(value, ConvertedTensor):
            yield id(value.original)
        elif isinstance(value, (LazyTensor, torch.Tensor)):
            yield id(value)


def _hides_tensors(content: Any) -> bool:
    """Return whether only torch.load can build some tensor: one that is not plain, or one inside an object."""
    rest, seen = [content], set[int]()
    while rest:
        for value in leaves(rest.pop()):
            if isinstance(value, (TensorEntry, StorageEntry)) or (isinstance(value, LazyTensor) and not value.is_plain):
                return True
            if isinstance(value, Unbuilt) and id(value) not in seen:
                seen.add(id(value))
                rest += (value.arguments, value.state, value.items)
    return False


def _with_tensors(content: Any) -> Any:
    return with_leaves(content, lambda leaf: leaf.exact() if isinstance(leaf, LazyTensor) else leaf)


def _filled(loaded: Any, rest: Any, made: dict[int, Any]) -> Any:
    """Return content that torch.load built with meta tensors, with real tensors in their places.

    Args:
        loaded: result of torch.load; its dicts and lists are changed.
        rest: the same content from the index, with tensors, and notes of objects that were not built.
        made: results for loaded containers so far, by id.
    """
    if isinstance(rest, torch.Tensor):
        return rest
    if id(loaded) in made:
        return made[id(loaded)]
    if type(loaded) is not type(rest):  # an object; the index has only a note of it
        return loaded
    if isinstance(loaded, dict):
        made[id(loaded)] = loaded
        for key in loaded:
            loaded[key] = _filled(loaded[key], rest[key], made)
    elif type(loaded) is list:
        made[id(loaded)] = loaded
        loaded[:] = [_filled(*pair, made) for pair in zip(loaded, rest, strict=True)]
    elif type(loaded) is tuple:
        made[id(loaded)] = tuple(_filled(*pair, made) for pair in zip(loaded, rest, strict=True))
        return made[id(loaded)]
    return loaded
