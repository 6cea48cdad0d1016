"""An opened checkpoint: its index, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rankload._formats.entry import TensorEntry
from rankload._formats.index import Index
from rankload._formats.source import Source
from rankload._text import printable

if TYPE_CHECKING:
    import torch


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by name; each is read when it is asked for. Use as a context manager, or close it.

    ``list(checkpoint)`` and ``checkpoint.entries`` read nothing, ``checkpoint["fc.weight"]`` reads that tensor's bytes
    into a new tensor on the CPU, ``dict(checkpoint)`` reads all. Not collective. Not for several threads at once.

    Attributes:
        entries: name → `TensorEntry`: dtype, shape, stride, file, offset and length in bytes, storage key. Tensors that
            are tied have the same storage.
        metadata: the texts in the headers of safetensors files.
        display_name: where it is, for messages.
    """

    def __init__(self, index: Index, sources: Callable[[str], Source], stack: ExitStack, display_name: str) -> None:
        self.entries: Mapping[str, TensorEntry] = index.tensors
        self.metadata: Mapping[str, str] = index.metadata
        self.display_name = printable(display_name)
        self._index, self._sources, self._stack = index, sources, stack
        self._is_closed = False

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is none of that name.
            LoadError: this torch has no such dtype, or the file ended early.
            FetchError: the origin does not give the bytes.
            ValueError: it is closed.
        """
        if self._is_closed:
            raise ValueError(f"{self.display_name}: tensor {name!r} of a closed checkpoint")
        from rankload._load.values.tensors import read_tensor  # imports torch, which a listing does without

        entry = self.entries[name]
        return read_tensor(self._sources(entry.file), entry, self._index.byte_orders[entry.file], self.display_name)

    @property
    def remainder(self) -> Mapping[str, Any]:
        """Name → value of what is no tensor, as torch.load returns it; what only torch.load builds is `Unbuilt`."""
        from rankload._load.module.leaves import with_leaves
        from rankload._load.values.torch_values import built  # imports torch

        made: dict[int, Any] = {}
        return {name: with_leaves(value, built, made) for name, value in self._index.remainder.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.display_name}: {len(self)} tensors, {self.size_bytes} bytes>"

    @property
    def size_bytes(self) -> int:
        """Bytes of all storages, each counted once."""
        storages = {(entry.file, entry.storage_key): entry.storage.length for entry in self.entries.values()}
        return sum(storages.values())

    def close(self) -> None:
        """Close files and connections."""
        self._is_closed = True
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
