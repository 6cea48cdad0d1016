"""The files of a checkpoint on this node, each opened once, and mapped on request."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from rankload._cache.files import wrap_read_errors
from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.source import LocalSource
from rankload._formats.unpack import open_unpacked
from rankload._load.node.node_copy import private_copy
from rankload._load.state_dict.read_checkpoint import read_checkpoint
from rankload._load.values.tensors import fill_memory
from rankload._platform.scratch import descriptor_path
from rankload._text import printable
from rankload.errors import LoadError


class CheckpointFiles:
    """The files of a checkpoint, by name. They stay open until ``stack`` closes; mappings live as long as tensors.

    Args:
        path: path of the checkpoint, or of the index of a checkpoint in several files.
        stack: closes the files.
        content: path of the checkpoint's bytes, if they are not at ``path``: those of an unpacked archive.

    Attributes:
        path: path of the checkpoint or index.
        name: file name of the checkpoint or index.
        display_name: name of the checkpoint in messages.
        used: tensors whose elements have been requested.
        is_in_memory: whether the checkpoint was unpacked from an archive into the node's memory.
        may_map: whether tensors may stay views of the mapped files after the call.
    """

    may_map = True

    def __init__(self, path: Path, stack: ExitStack, content: Path | None = None) -> None:
        self.path, self.name, self.display_name = path, path.name, printable(str(path))
        self.used: list[TensorEntry] = []
        self._content = content or path
        self.is_in_memory = content not in (None, path)
        self._stack = stack
        self._is_closed = False
        stack.callback(self._close)
        self._sources: dict[str, LocalSource] = {}
        self._mappings: dict[str, torch.UntypedStorage] = {}
        self._storages: dict[StorageEntry, torch.UntypedStorage] = {}

    def source(self, name: str) -> LocalSource:
        """Open a file, or the only member of an archive.

        Raises:
            CacheError: the file cannot be opened.
            LoadError: the load is over, and the files are closed.
        """
        if self._is_closed:  # the descriptor may belong to another file by now
            raise LoadError(
                f"{self.display_name}: a hook kept a lazy tensor, and used it after the load; clone() tensors that a "
                "hook keeps"
            )
        if name not in self._sources:
            path = self._content if name == self.name else self.path.parent / name
            with wrap_read_errors(path):
                self._sources[name] = open_unpacked(path, self._stack)
        return self._sources[name]

    def read(self, name: str, address: int, offset: int, length: int, *, what: str) -> None:
        """Read bytes of a file to an address in memory. Thread-safe once the file is open.

        Args:
            name: name of the file.
            address: address in memory, with room for ``length`` bytes.
            offset: offset of the first byte in the file.
            length: number of bytes.
            what: what is read, for the message.

        Raises:
            LoadError: the file ended early.
            CacheError: the file cannot be read.
        """
        source = self.source(name)
        with wrap_read_errors(self.display_name):
            found = fill_memory(address, length, source, offset)
        if found != length:
            raise LoadError(f"{self.display_name}: the file ended within {what}: it was truncated after it was opened")

    def mapping(self, name: str) -> torch.UntypedStorage:
        """Map a file privately: writes to the mapping never reach the file.

        Raises:
            LoadError: the file cannot be mapped.
        """
        if name not in self._mappings:
            source = self.source(name)
            path = descriptor_path(source.descriptor)  # the opened file, even if another one has its name now
            try:
                mapped = torch.UntypedStorage.from_file(path, False, source.size_bytes)
            except RuntimeError as error:
                raise LoadError(f"{self.display_name}: {printable(name)} cannot be mapped: {error}") from error
            self._mappings[name] = cast(torch.UntypedStorage, mapped)
        return self._mappings[name]

    def storage(self, entry: TensorEntry) -> torch.UntypedStorage:
        """Return the storage of a tensor, mapped or read. Tensors that share a storage get the same object.

        Raises:
            LoadError: the file ended within the storage.
            CacheError: the file cannot be read.
        """
        whole = entry.storage
        if whole not in self._storages:
            if self.may_map and not whole.offset % entry.item_bytes and whole.length:
                mapping: Any = self.mapping(whole.file)
                self._storages[whole] = mapping[whole.offset : whole.offset + whole.length]
            else:
                storage = torch.empty(whole.length, dtype=torch.uint8, device="cpu").untyped_storage()
                what = f"tensor {entry.name!r}"
                self.read(whole.file, storage.data_ptr(), whole.offset, whole.length, what=what)
                self._storages[whole] = storage
        return self._storages[whole]

    def load(self, *, weights_only: bool, mmap: bool | None) -> Any:
        """Load the whole checkpoint on the CPU, as torch.load does."""
        path = self._content
        if not self.may_map and mmap is None:
            path = private_copy(path, self._stack)
        return read_checkpoint(path, "cpu", weights_only=weights_only, mmap=mmap, display_name=self.display_name)

    def load_structure(self, *, weights_only: bool) -> Any:
        """Load the whole checkpoint as torch.load does, but with meta tensors: no tensor is read."""
        return read_checkpoint(self._content, "meta", weights_only=weights_only, display_name=self.display_name)

    def _close(self) -> None:
        self._is_closed = True

    def has(self, entry: TensorEntry) -> bool:
        """Return whether a tensor's bytes are here."""
        return True

    def note_use(self, entry: TensorEntry) -> None:
        """Record that a tensor's elements are needed.

        Raises:
            LoadError: the elements are not here.
        """
        self.used.append(entry)
