"""Checkpoints in several files: which they are."""

from __future__ import annotations

from pathlib import Path

from rankload._checkpoint.open import sniff
from rankload._checkpoint.sharded import part_names
from rankload._checkpoint.source import LocalSource
from rankload._deliver.failures import translated


def parts_of(path: Path) -> list[str]:
    """Return the names of the files that a file is the index of."""
    with translated(path):
        if sniff(path) != "sharded":
            return []
        with path.open("rb", buffering=0) as file:
            return part_names(LocalSource(file.fileno()))


def all_files(path: Path) -> list[Path]:
    """Return the paths of a checkpoint's files, its index first."""
    return [path, *(path.parent / name for name in parts_of(path))]
