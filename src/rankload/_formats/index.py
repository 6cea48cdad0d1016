"""The index of a checkpoint: every tensor's entry by name, and all values that are not tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.pickle_values import NotUnderstoodError

ByteOrder = Literal["little", "big"]

#: Limits on the walk through content that contains the same parts many times over. The names of a million tensors have
#: about 100 MB.
_MAX_VALUES = 2_000_000
_MAX_CHARACTERS = 1 << 27
_MAX_DEPTH = 100

_CONTAINERS = (dict, OrderedDict, Counter, defaultdict, list, tuple)
_TENSORS_AND_CONTAINERS = (TensorEntry, *_CONTAINERS)


def _looked_up(storage: StorageEntry) -> None:
    """Do nothing: the place of the storage is not inferred."""


@dataclass(frozen=True)
class FileIndex:
    """The index of one file, from its headers.

    Attributes:
        content: saved content, with a `TensorEntry` (without a name yet) in the place of each tensor.
        byte_order: byte order of the elements; None if the file does not say. Such files are little-endian as far as
            we know.
        is_exact: whether the content is what torch.load would return, apart from tensors and `Unbuilt` objects.
        storages: all storages that the pickle mentions, in that order.
        confirm: called before a storage is read; raises BrokenFileError if it is elsewhere than inferred.
    """

    content: Any
    byte_order: ByteOrder | None = None
    is_exact: bool = False
    storages: tuple[StorageEntry, ...] = ()
    confirm: Callable[[StorageEntry], None] = _looked_up


@dataclass(frozen=True)
class Index:
    """The index of a whole checkpoint.

    Attributes:
        tensors: entries by name, in the order in which they were saved.
        remainder: all other values by name: epochs, hyperparameters. An `Unbuilt` stands for an object that only
            torch.load can build.
        byte_orders: byte order of the elements, by file.
        metadata: free-form texts of safetensors files.
        content: saved content with its nesting, and entries in the place of tensors.
        storages: all storages, including those that no tensor uses.
        is_exact, confirm: see `FileIndex`.
    """

    tensors: Mapping[str, TensorEntry]
    remainder: Mapping[str, Any]
    byte_orders: Mapping[str, ByteOrder]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    content: Any = None
    storages: tuple[StorageEntry, ...] = ()
    is_exact: bool = True
    confirm: Callable[[StorageEntry], None] = _looked_up


def flatten(index: FileIndex, file: str) -> Index:
    """Name the tensors of nested content by their keys, joined with dots.

    Raises:
        NotUnderstoodError: the content is nested too deeply, or contains itself, or its names are too long in total.
    """
    tensors: dict[str, TensorEntry] = {}
    remainder: dict[str, Any] = {}
    repeated: Counter[str] = Counter()
    characters_left = _MAX_CHARACTERS
    for path, value in _leaves(index.content):
        characters_left -= sum(map(len, path))
        if characters_left < 0:
            raise NotUnderstoodError("content with names that are too long")
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
        is_exact=index.is_exact,
        confirm=index.confirm,
    )


def _leaves(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each leaf with the keys that lead to the leaf. A list without tensors is one leaf."""
    levels: list[tuple[tuple[str, ...], Iterator[tuple[Any, Any]]]] = []
    path: tuple[str, ...] = ()
    value, count = content, 0
    while True:
        count += 1 + (len(value) if type(value) in _CONTAINERS else 0)
        if count > _MAX_VALUES or len(path) > _MAX_DEPTH:
            raise NotUnderstoodError("content that is nested too deeply")
        if (items := _items(value, is_top=not path)) is not None:
            levels.append((path, items))
        else:
            yield path, value
        item = None
        while levels and (item := next(levels[-1][1], None)) is None:
            levels.pop()
        if item is None:
            return
        key, value = item
        path = (*levels[-1][0], str(key))


def _items(value: Any, *, is_top: bool) -> Iterator[tuple[Any, Any]] | None:
    """Return the keys and values of a container whose values get names of their own; None for a leaf."""
    if isinstance(value, dict) and (value or is_top):
        return iter(value.items())
    if type(value) in (list, tuple) and any(type(item) in _TENSORS_AND_CONTAINERS for item in value):
        return enumerate(value)
    return None
