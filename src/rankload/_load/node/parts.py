"""List the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from rankload._formats.sharded import has_weight_map, part_names
from rankload._formats.source import LocalSource
from rankload._load.values.torch_errors import wrap_load_errors


def parts_of(path: Path) -> list[str]:
    """Return the names of an index's parts; empty if the file is no index."""
    with wrap_load_errors(path), path.open("rb", buffering=0) as file:
        source = LocalSource(file.fileno())
        return part_names(source) if has_weight_map(source) else []


def all_files(path: Path) -> list[Path]:
    """Return the paths of a checkpoint's files; the index comes first."""
    return [path, *(path.parent / name for name in parts_of(path))]
