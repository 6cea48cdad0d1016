"""An opened checkpoint: its index, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.entry import TensorEntry
from rankload._formats.index import Index
from rankload._formats.source import Source
from rankload._text import printable
from rankload.errors import LoadError

if TYPE_CHECKING:
    import torch


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by name, read on access. Use as a context manager, or call `close`.

    ``list(checkpoint)`` and ``checkpoint.entries`` read nothing. ``checkpoint["fc.weight"]`` reads that tensor's bytes
    into a new tensor on the CPU, and ``dict(checkpoint)`` reads all tensors. Not collective. Not thread-safe.

    Attributes:
        entries: name → `TensorEntry`: dtype, shape, stride, file, offset and length in bytes, storage key. Tied tensors
            have the same storage.
        metadata: texts in the headers of safetensors files.
        display_name: path or URL of the checkpoint, for messages.
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
            KeyError: no tensor has that name.
            LoadError: this torch lacks the tensor's dtype, or the file is damaged or ended early.
            FetchError: the bytes could not be fetched from the origin.
            ValueError: the checkpoint is closed.
        """
        if self._is_closed:
            raise ValueError(f"{self.display_name}: cannot read tensor {name!r} of a closed checkpoint")
        from rankload._load.values.tensors import read_tensor  # imports torch, which a listing does without

        entry = self.entries[name]
        try:
            self._index.confirm(entry.storage)
        except BrokenFileError as error:
            raise LoadError(f"{self.display_name}: {error}", path=self.display_name, tensor=name) from None
        return read_tensor(self._sources(entry.file), entry, self._index.byte_orders[entry.file], self.display_name)

    @property
    def remainder(self) -> Mapping[str, Any]:
        """Values that are not tensors, by name, as torch.load returns them. Others are `Unbuilt`."""
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
        """Bytes of all storages; each storage counts once."""
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
