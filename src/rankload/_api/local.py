"""`load`: torch.load in one process, with a map_location that fits the rank."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from rankload._api.tracebacks import short_tracebacks
from rankload._cache.files import check_has_scheme
from rankload._coordination.call_context import CallContext
from rankload._coordination.membership import own_identity
from rankload._coordination.single_process import SingleProcessChannel
from rankload._formats.broken import BrokenFileError
from rankload._formats.sniff import Format, describe, format_of, sniff
from rankload._formats.source import FileObject
from rankload._load.device.devices import resolve_map_location
from rankload._load.device.readers import Limits
from rankload._load.node.node_copy import settled
from rankload._load.state_dict.read_checkpoint import read_checkpoint
from rankload._load.state_dict.torch_load_checks import checked_for_torch
from rankload._load.values.torch_errors import wrap_load_errors
from rankload._platform.scratch import descriptor_path, scratch_file
from rankload._settings import Settings
from rankload._text import printable
from rankload._types import FetchedFile, Identity
from rankload._urls import Url
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from rankload._api.state_dict import MapLocation

_HEAD_BYTES = 1024

#: Formats, as the first bytes show them, that torch.load loads from open files.
_FORMATS_OF_TORCH: frozenset[Format] = frozenset(
    {"torch_zip", "torchscript", "single_member_zip", "zip", "legacy", "legacy_tar", "tar"}
)


@short_tracebacks
def load(
    f: str | os.PathLike[str] | IO[bytes],
    map_location: MapLocation = None,
    *,
    weights_only: bool | None = True,
    mmap: bool | None = None,
    **torch_load_arguments: Any,
) -> Any:
    """Load a local checkpoint in this process, as torch.load does. Not collective: the call waits for no other rank.

    The call differs from torch.load in four ways. ``map_location=None`` and per-rank templates work as in
    `dist_load_state_dict_from_url`. Files are mapped wherever their format allows. Safetensors files are loaded, too,
    whatever their name. Every error names the file.

    Args:
        f: a path, a file URL, or an open, seekable binary file such as a ``BytesIO``. An open file is read from its
            current position; if its format is safetensors, a temporary copy is made.
        map_location: any form that torch.load takes, or a per-rank template.
        weights_only: refuse everything but tensors and plain containers.
        mmap: map the file; default: wherever the format allows. Not for open files.
        **torch_load_arguments: other arguments of torch.load: ``pickle_module``, ``encoding``, …

    Returns:
        What torch.load returns: usually ``dict[str, Tensor]``, shapes and dtypes as saved.

    Raises:
        UnsafePickleError: ``weights_only`` refused the file.
        MissingFileError: the file does not exist. Also a FileNotFoundError.
        LoadError: the file could not be loaded for another reason.
        DeviceError: ``map_location`` names a device that this process does not have.
        ArgumentError: ``f`` is a remote URL; `dist_load_state_dict_from_url` loads from those.
    """
    identity = own_identity()
    target = resolve_map_location(map_location, identity)
    if isinstance(f, (str, os.PathLike)):
        location = Url.parse(os.fspath(f))
        path = location.local_path
        if path is None:
            raise ArgumentError(
                f"load({location.display_name!r}): not a local file; dist_load_state_dict_from_url loads from URLs"
            )
        check_has_scheme(location.raw, path)
        return _load_file(path, target, identity, weights_only=weights_only, mmap=mmap, **torch_load_arguments)
    if mmap:
        raise ArgumentError("load(…, mmap=True): an open file cannot be mapped; pass its path")
    display_name = printable(str(getattr(f, "name", "an open file")))
    with wrap_load_errors(Path(display_name), opened=f):
        if (head := _head(f)) is not None:
            with _copied(io.BytesIO(head)) as path:
                file_format, got = sniff(path), describe(path)
            if file_format == "safetensors":
                with _copied(f) as path:
                    return read_checkpoint(
                        path, target, weights_only=weights_only, mmap=mmap, display_name=display_name
                    )
            if file_format not in _FORMATS_OF_TORCH:
                # torch.load would read the file as a pickle, and give misleading advice on weights_only
                raise BrokenFileError(f"expected a checkpoint, got {got}")
            target = _checked(f, target)
        return torch.load(f, target, weights_only=weights_only, **torch_load_arguments)


def _load_file(
    path: Path, target: Any, identity: Identity, *, weights_only: bool | None, mmap: bool | None, **arguments: Any
) -> Any:
    settings = Settings.from_environment()
    with wrap_load_errors(path), SingleProcessChannel(identity) as channel, ExitStack() as stack:
        file = FetchedFile(path, path.stat().st_size, None, "local")
        found = settled(path, file, target, CallContext(channel, settings, stack), mmap=mmap)
        limits = Limits.of(identity, settings)
        return read_checkpoint(
            found, target, weights_only=weights_only, mmap=mmap, limits=limits, display_name=str(path), **arguments
        )


def _checked(f: IO[bytes], target: Any) -> Any:
    """Run the checks that torch.load lacks, and return the map_location to pass. The file keeps its position.

    Raises:
        BrokenFileError: the file contradicts itself.
    """
    position = f.tell()
    try:
        source = FileObject(f)
    except (OSError, ValueError):  # the file's size is unknown
        return target
    try:
        file_format = format_of(source)
        if file_format in ("zip", "single_member_zip"):
            # torch's zip reader ignores case in member names: it might find a checkpoint in this archive nevertheless
            raise BrokenFileError("expected a checkpoint, got a zip archive that torch.save did not write")
        return checked_for_torch(source, file_format, target).map_location
    finally:
        f.seek(position)


def _head(f: IO[bytes]) -> bytes | None:
    """Return the bytes after a file's position, and keep that position; None if the file cannot do that."""
    try:
        position = f.tell()
        head = f.read(_HEAD_BYTES)
        f.seek(position)
    except (AttributeError, OSError):
        return None
    return head if isinstance(head, bytes) else None


@contextmanager
def _copied(f: IO[bytes]) -> Iterator[Path]:
    """Copy the rest of an open file to a temporary file, and yield the copy's path."""
    with scratch_file("a copy of a file object") as copy:
        shutil.copyfileobj(f, copy, length=1 << 20)
        copy.flush()
        yield Path(descriptor_path(copy.fileno()))
