"""Advice for users who pass a directory as a checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rankload._text import printable

#: File that torch.distributed.checkpoint writes last (torch/distributed/checkpoint/filesystem.py).
_DCP_METADATA = ".metadata"


def hint_on_directory(path: Path) -> str:
    """Return advice to append to an error message; empty if the path is not a directory."""
    with suppress(OSError):
        if not path.is_dir():
            return ""
        if (path / _DCP_METADATA).is_file():
            return " but a directory of torch.distributed.checkpoint's: load it with torch.distributed.checkpoint.load"
        indexes = sorted(found.name for found in path.glob("*.index*.json"))
        such_as = f", such as {printable(indexes[0])}" if indexes else ""
        return f" but a directory: name the file in it{such_as}"
    return ""
