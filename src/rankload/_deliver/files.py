"""The files of a checkpoint on this node, opened once each, and mapped where that is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from rankload._cache.failures import reading
from rankload._checkpoint.entry import TensorEntry
from rankload._checkpoint.source import LocalSource
from rankload._checkpoint.unpacked import open_unpacked
from rankload._deliver.read import read_checkpoint


class CheckpointFiles:
    """The files of one folder by their names. They stay open until ``closing`` closes; mappings live on with tensors.

    Args:
        path: the checkpoint, or the index of one in several files, which are beside it.
        closing: closes them.

    Attributes:
        path: see above.
        name: of the checkpoint among its files.
        shown: how to name it in messages.
        used: tensors of which somebody has wanted to see the elements.
    """

    def __init__(self, path: Path, closing: ExitStack) -> None:
        self.path, self.name, self.shown = path, path.name, str(path)
        self.used: list[TensorEntry] = []
        self._closing = closing
        self._sources: dict[str, LocalSource] = {}
        self._mappings: dict[str, torch.UntypedStorage] = {}

    def source(self, name: str) -> LocalSource:
        """Open a file; of an archive of one checkpoint, that.

        Raises:
            CacheError: it cannot be opened.
        """
        if name not in self._sources:
            path = self.path.parent / name
            with reading(path):
                self._sources[name] = open_unpacked(path, self._closing)
        return self._sources[name]

    def mapping(self, name: str) -> torch.UntypedStorage:
        """Map a file privately: what is written there never reaches it."""
        if name not in self._mappings:
            source = self.source(name)
            path = f"/dev/fd/{source.descriptor}"  # the file that was opened, not another of its name
            self._mappings[name] = cast(
                torch.UntypedStorage, torch.UntypedStorage.from_file(path, False, source.size_bytes)
            )
        return self._mappings[name]

    def load(self, *, weights_only: bool, mmap: bool | None) -> Any:
        """Load the whole checkpoint on the CPU, as torch.load does."""
        return read_checkpoint(self.path, "cpu", weights_only=weights_only, mmap=mmap)

    def has(self, entry: TensorEntry) -> bool:
        """Tell whether a tensor's bytes are here."""
        return True

    def note_use(self, entry: TensorEntry) -> None:
        """Take note that a tensor's elements are wanted.

        Raises:
            LoadError: they are not here.
        """
        self.used.append(entry)
