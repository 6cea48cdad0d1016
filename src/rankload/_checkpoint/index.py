"""The index of a checkpoint: every tensor's entry by name, and what is there besides tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from rankload._checkpoint.entry import StorageEntry, TensorEntry
from rankload._checkpoint.pickle_values import NotUnderstoodError

ByteOrder = Literal["little", "big"]

#: Bounds the walk through content whose parts are in it many times over.
_MOST_VALUES = 2_000_000
_DEEPEST = 100

_CONTAINERS = (dict, OrderedDict, list, tuple)
_TENSORS_AND_CONTAINERS = (TensorEntry, *_CONTAINERS)


@dataclass(frozen=True)
class FileIndex:
    """What one file's headers say.

    Attributes:
        content: as saved, with a `TensorEntry` (without a name yet) in the place of each tensor.
        byte_order: of the elements; None where the file does not say. Then it is little, as far as is known.
        is_exact: apart from tensors and what is `Unbuilt`, the content is what torch.load would return: nothing in it
            was made simpler.
        storages: all that the pickle mentions, in that order.
    """

    content: Any
    byte_order: ByteOrder | None = None
    is_exact: bool = False
    storages: tuple[StorageEntry, ...] = ()


@dataclass(frozen=True)
class Index:
    """What a whole checkpoint has.

    Attributes:
        tensors: entries by name, in the order in which they were saved.
        remainder: everything else by name: epochs, hyperparameters; what is not built without torch.load is an
            `Unbuilt`, which names it.
        byte_orders: of the elements, by file.
        metadata: the free-form texts of safetensors files.
        content: as saved, nested as it is, with entries in the place of tensors.
        storages: all that there are, of tensors or not.
    """

    tensors: Mapping[str, TensorEntry]
    remainder: Mapping[str, Any]
    byte_orders: Mapping[str, ByteOrder]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    content: Any = None
    storages: tuple[StorageEntry, ...] = ()


def flatten(index: FileIndex, file: str) -> Index:
    """Name the tensors of nested content by their keys, joined with dots.

    Raises:
        NotUnderstoodError: it is nested too deeply, or for ever.
    """
    tensors: dict[str, TensorEntry] = {}
    remainder: dict[str, Any] = {}
    repeated: Counter[str] = Counter()
    for path, value in _leaves(index.content):
        name = stem = ".".join(path)
        while name in tensors or name in remainder:  # {"a.b": …, "a": {"b": …}}
            repeated[stem] += 1
            name = f"{stem}#{repeated[stem] + 1}"
        if isinstance(value, TensorEntry):
            tensors[name] = value.named(name)
        else:
            remainder[name] = value
    return Index(
        MappingProxyType(tensors),
        MappingProxyType(remainder),
        MappingProxyType({file: index.byte_order or "little"}),
        content=index.content,
        storages=index.storages,
    )


def _leaves(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what is no container, with the keys that lead to it. Lists without a tensor in them stay whole."""
    rest: list[tuple[tuple[str, ...], Any]] = [((), content)]
    count = 0
    while rest:
        path, value = rest.pop()
        count += 1
        if type(value) in _CONTAINERS:
            count += len(value)
        if count > _MOST_VALUES or len(path) > _DEEPEST:
            raise NotUnderstoodError("content that is nested too deeply")
        if isinstance(value, dict) and (value or not path):
            rest.extend(((*path, str(key)), item) for key, item in reversed(value.items()))
        elif type(value) in (list, tuple) and any(type(item) in _TENSORS_AND_CONTAINERS for item in value):
            rest.extend(((*path, str(number)), item) for number, item in reversed(list(enumerate(value))))
        else:
            yield path, value
