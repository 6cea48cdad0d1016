"""Check what torch.load does not, so that no bytes are taken for weights that are not theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.serialization import config

from rankload._formats import zip_archive as torch_zip
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.sniff import Format
from rankload._formats.source import Source
from rankload._formats.torch_legacy import read_legacy_index
from rankload._formats.torch_zip import check_script, read_zip_index
from rankload._formats.zip_members import check_compressed, check_listing
from rankload._load.device.map_location import Restore, location_of_script, restore_of

#: Tensors are mapped only where each of their elements is aligned, for torch's kernels: the longest are complex128's.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Checked:
    """What is known of a file that torch.load is to load.

    Attributes:
        map_location: with which it may.
        doubt: why its storages could not be checked; empty where they were.
    """

    map_location: Any
    doubt: str = ""


def checked_for_torch(source: Source, file_format: Format, map_location: Any) -> Checked:
    """Check what torch.load does not.

    Where torch.load gets fewer bytes than a storage has, it may leave the rest as it was: memory of this process that
    nothing has been written to.

    Args:
        source: the file.
        file_format: of it.
        map_location: any form that torch.load takes.

    Raises:
        BrokenFileError: the file contradicts itself; no way of loading it would be right.
    """
    if file_format in ("torch_zip", "torchscript"):
        directory = torch_zip.read_directory(source)
        check_listing(directory, source.size_bytes)
        check_compressed(source, directory)
    doubt = ""
    try:
        if file_format == "torchscript":
            return Checked(location_of_script(map_location, check_script(source)))
        if file_format == "torch_zip":
            read_zip_index(source, "", is_remote=False)
        elif file_format == "legacy":
            read_legacy_index(source, "")  # a storage may be nowhere in the file
    except NotUnderstoodError as error:
        doubt = str(error)
        if file_format == "torchscript":
            return Checked(location_of_script(map_location, ()), doubt)
    if file_format == "legacy":
        map_location = _fixed(restore_of(map_location), is_cleared=bool(doubt))
    return Checked(map_location, doubt)


def why_not_mapped(source: Source, file_format: Format, doubt: str) -> str:
    """Return why torch.load must read a file instead of mapping it; empty if it may map.

    Mapped, torch.load checks nothing: it takes as many bytes as the pickle says from where a record begins, compressed
    ones too. So every storage that the pickle mentions is held against its record before. Where the pickle is not
    understood that is impossible, and torch.load has to read: then it compares the lengths itself.

    Args:
        source: the file.
        file_format: of it.
        doubt: see `Checked`.

    Raises:
        BrokenFileError: the file contradicts itself; no way of loading it would be right.
    """
    if file_format != "torch_zip":
        return f"the format {file_format} cannot be"
    directory = torch_zip.read_directory(source)
    offsets = torch_zip.payload_offsets(source, directory)
    storages = [member for member in directory.members if member.name.startswith(f"{directory.root}/data/")]
    if not all(member.is_stored and offsets[member.name] % ALIGNMENT_BYTES == 0 for member in storages):
        return "its tensors are compressed or not aligned"
    if doubt:
        return f"its tensors cannot be checked: {doubt}"
    if _guesses_offsets():
        return "torch would guess where its tensors are (calculate_storage_offsets)"
    return ""


def _fixed(restore: Restore, *, is_cleared: bool) -> Restore:
    """Return what keeps torch from making a storage longer for a tensor that reaches beyond it, as it would here alone.

    Args:
        restore: puts the storages where they belong.
        is_cleared: clear each before torch fills it from the file, if it does.
    """

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        placed = restore(storage, tag)
        if placed.device.type == "meta":
            return placed
        if is_cleared:
            cast(Any, placed).fill_(0)
        return cast(torch.UntypedStorage, placed[:])  # a view of all of it, which cannot be resized

    return place


def _guesses_offsets() -> bool:
    """Return whether the user has switched on what computes offsets from the pickle alone (torch 2.7)."""
    return bool(getattr(config.load, "calculate_storage_offsets", False))
