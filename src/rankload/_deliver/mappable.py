"""Whether torch.load may map a file: only where it cannot take bytes for weights that are not theirs."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.utils.serialization import config

from rankload._checkpoint import torch_zip
from rankload._checkpoint.open import Format
from rankload._checkpoint.pickle_values import NotUnderstoodError
from rankload._checkpoint.source import LocalSource
from rankload._checkpoint.zip_index import check_script, read_zip_index
from rankload._deliver.plain import ALIGNMENT_BYTES
from rankload._errors import printable

logger = logging.getLogger(__name__)


def why_not_mapped(path: Path, file_format: Format) -> str:
    """Return why torch.load must read a file instead of mapping it; empty if it may map.

    Mapped, torch.load checks nothing: it takes as many bytes as the pickle says from where a record begins, compressed
    ones too. So every storage that the pickle mentions is held against its record here. Where the pickle is not
    understood that is impossible, and torch.load has to read: then it compares the lengths itself.

    Raises:
        BrokenFileError: the file contradicts itself; no way of loading it would be right.
    """
    if file_format == "torchscript":
        _check_script(path)
    if file_format != "torch_zip":
        return f"the format {file_format} cannot be"
    with path.open("rb", buffering=0) as file:
        source = LocalSource(file.fileno())
        directory = torch_zip.read_directory(source)
        offsets = torch_zip.payload_offsets(source, directory)
        storages = [member for member in directory.members if member.name.startswith(f"{directory.root}/data/")]
        if not all(member.is_stored and offsets[member.name] % ALIGNMENT_BYTES == 0 for member in storages):
            return "its tensors are compressed or not aligned"
        try:
            read_zip_index(source, path.name, is_remote=False)
        except NotUnderstoodError as error:
            return f"its tensors cannot be checked: {error}"
    if _guesses_offsets():
        return "torch would guess where its tensors are (calculate_storage_offsets)"
    return ""


def _check_script(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        try:
            check_script(LocalSource(file.fileno()))
        except NotUnderstoodError as error:  # it is loaded only where its code is trusted
            logger.debug("%s cannot be checked before torch.jit.load: %s", printable(str(path)), error)


def _guesses_offsets() -> bool:
    """Return whether the user has switched on what computes offsets from the pickle alone (torch 2.7)."""
    return bool(getattr(config.load, "calculate_storage_offsets", False))
