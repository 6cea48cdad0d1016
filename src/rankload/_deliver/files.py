"""The files of a local checkpoint, opened once each, and mapped where that is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch

from rankload._cache.failures import reading
from rankload._checkpoint.source import LocalSource


class CheckpointFiles:
    """The files of one folder by their names. They stay open until ``closing`` closes; mappings live on with tensors.

    Args:
        directory: where they are.
        closing: closes them.
    """

    def __init__(self, directory: Path, closing: ExitStack) -> None:
        self._directory, self._closing = directory, closing
        self._sources: dict[str, LocalSource] = {}
        self._mappings: dict[str, torch.UntypedStorage] = {}

    def source(self, name: str) -> LocalSource:
        """Open a file.

        Raises:
            CacheError: it cannot be opened.
        """
        if name not in self._sources:
            path = self._directory / name
            with reading(path):
                self._sources[name] = LocalSource(self._closing.enter_context(path.open("rb", buffering=0)).fileno())
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
