"""Checks that torch.load lacks, so that no foreign bytes become weights."""

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

#: Alignment of mapped tensors: torch's kernels need aligned elements, and complex128 has the largest.
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Checked:
    """The result of checking a file for torch.load.

    Attributes:
        map_location: the map_location to pass to torch.load.
        doubt: why the storages could not be checked; empty if they were.
    """

    map_location: Any
    doubt: str = ""


def checked_for_torch(source: Source, file_format: Format, map_location: Any) -> Checked:
    """Run the checks that torch.load lacks.

    If torch.load gets fewer bytes than a storage has, it may leave the rest uninitialised: old memory of this process.

    Args:
        source: the file.
        file_format: format of the file.
        map_location: any form that torch.load takes.

    Raises:
        BrokenFileError: the file contradicts itself, so no way of loading it is right.
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
            read_legacy_index(source, "")  # detects storages that are missing from the file
    except NotUnderstoodError as error:
        doubt = str(error)
        if file_format == "torchscript":
            return Checked(location_of_script(map_location, ()), doubt)
    if file_format == "legacy":
        map_location = _fixed(restore_of(map_location), is_cleared=bool(doubt))
    return Checked(map_location, doubt)


def why_not_mapped(source: Source, file_format: Format, doubt: str) -> str:
    """Return why torch.load must read a file instead of mapping it; empty if it may map.

    torch.load checks nothing in a mapped file: from the begin of a record, it uses as many bytes as the pickle says,
    even compressed ones. So rankload compares every storage in the pickle with its record first. If the pickle is not
    understood, torch.load has to read the file, and compares the lengths itself.

    Args:
        source: the file.
        file_format: format of the file.
        doubt: see `Checked`.

    Raises:
        BrokenFileError: the file contradicts itself, so no way of loading it is right.
    """
    if file_format != "torch_zip":
        return f"the format {file_format} cannot be mapped"
    directory = torch_zip.read_directory(source)
    offsets = torch_zip.payload_offsets(source, directory)
    storages = [member for member in directory.members if member.name.startswith(f"{directory.root}/data/")]
    if not all(member.is_stored and offsets[member.name] % ALIGNMENT_BYTES == 0 for member in storages):
        return "its tensors are compressed or not aligned"
    if doubt:
        return f"its tensors cannot be checked: {doubt}"
    if _guesses_offsets():
        return "torch would compute its tensors' offsets without a check (calculate_storage_offsets)"
    return ""


def _fixed(restore: Restore, *, is_cleared: bool) -> Restore:
    """Return a restore function whose storages torch cannot resize.

    In the legacy format alone, torch would enlarge a storage for a tensor that reaches beyond it.

    Args:
        restore: moves storages to their devices.
        is_cleared: whether to fill each storage with zeros first, in case torch does not fill it from the file.
    """

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        placed = restore(storage, tag)
        if placed.device.type == "meta":
            return placed
        if is_cleared:
            cast(Any, placed).fill_(0)
        return cast(torch.UntypedStorage, placed[:])  # a view of the whole storage cannot be resized

    return place


def _guesses_offsets() -> bool:
    """Return whether the user lets torch compute offsets from the pickle alone (torch 2.7)."""
    return bool(getattr(config.load, "calculate_storage_offsets", False))
