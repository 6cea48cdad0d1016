"""Copy files that may change under a mapping into memory that the ranks of a node share.

The pages of a mapping belong to the file until this process writes to them. If another process truncates the file, or
its file server fails, this process gets SIGBUS. If another process rewrites the file in place, the weights change. So
only files that rankload published stay mapped after a call: rankload replaces files only by rename. They must also be
on a filesystem of this machine.
"""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rankload._cache.access import name_of
from rankload._cache.files import wrap_read_errors
from rankload._coordination.call_context import CallContext
from rankload._coordination.launchers import identity_from_environment
from rankload._coordination.single_process import SingleProcessChannel
from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.sniff import Format, sniff
from rankload._formats.source import LocalSource
from rankload._formats.torch_zip import read_zip_index
from rankload._load.device.devices import visible_accelerator
from rankload._load.device.map_location import goes_by_tags, location_of
from rankload._load.device.readers import Readers, await_reader
from rankload._load.node.available_memory import available_bytes
from rankload._load.node.held import Held, hold
from rankload._load.node.memory_file import folder_of
from rankload._load.node.node_memory import NodeMemory
from rankload._load.node.parts import all_files, parts_of
from rankload._platform.linux import is_on_local_disk
from rankload._settings import Settings
from rankload._text import printable
from rankload._types import FetchedFile, Progress
from rankload.errors import DigestMismatchError, LoadError

_logger = logging.getLogger("rankload")

#: Bytes that one thread reads in order, which is fast on file servers and disks; and the number of threads.
_STRIPE_BYTES = 16 << 20
_THREADS = 4

#: Size of the copy buffer: small enough to stay in a core's cache between the read and the write.
_BUFFER_BYTES = 256 << 10

#: Largest share of the free memory that a copy may take: the job needs memory for other things, too.
_MAX_SHARE_OF_FREE_MEMORY = 0.8

#: Formats whose files stay mapped. torch.load makes private copies of all others.
_MAPPED_FORMATS: frozenset[Format] = frozenset({"torch_zip", "safetensors", "sharded"})


def why_copied(path: Path, map_location: Any, *, is_published: bool) -> str:
    """Return why a checkpoint must not stay mapped; empty if it may, or if no tensor would stay mapped.

    Args:
        path: path of the checkpoint, or of the index of a checkpoint in several files.
        map_location: any form that torch.load takes, already resolved for this rank.
        is_published: whether rankload published the file and its parts.
    """
    if is_published and all(map(_is_on_local_disk, all_files(path))):
        return ""
    if not _stays_on_cpu(path, map_location):
        return ""
    return "it is on a network filesystem" if is_published else "rankload did not put it there, and it may be rewritten"


def with_node_copy(
    held: Held,
    display_name: Path,
    call: CallContext,
    *,
    sha256: str | None = None,
    must_fit: bool = True,
) -> Path | None:
    """Copy a checkpoint into memory that the ranks of this node share; return the path of the copy.

    One rank of the node reads the files, in large stripes; the others open its memory. If that rank fails, they raise
    its error.

    Args:
        held: the checkpoint's open files.
        display_name: path of the checkpoint, for messages.
        call: context of the call. Every rank of a node that loads from these files may call this.
        sha256: digest to verify the copy against, 64 hex digits; None to skip. The parts of an index are not verified.
        must_fit: return None, and copy nothing, if there is not enough free memory.

    Raises:
        DigestMismatchError: the copy has another digest.
        LoadError: the file was changed meanwhile.
        ProgressTimeoutError: the file does not answer.
        RankloadError: the copying rank failed.
    """
    name = held.path.name
    with wrap_read_errors(display_name):
        sizes = {one: os.fstat(descriptor).st_size for one, descriptor in held.descriptors.items()}
        memory = NodeMemory.claim(
            sizes,
            call.channel,
            call.stack,
            purpose="node copy",
            fits=partial(_fits, sizes.values()) if must_fit else None,
        )
        if memory is None:
            return None
        if memory.is_received_here:
            for one, descriptor in held.descriptors.items():
                text = printable(str(display_name.parent / one))
                _copy(descriptor, memory.descriptors[one], sizes[one], text, call)
            if sha256 is not None:
                owner_uid = os.fstat(held.descriptors[name]).st_uid
                _verify(memory.descriptors[name], sizes[name], sha256, display_name, owner_uid, call)
    memory.tell_or_wait(call.channel)
    copied = folder_of(memory.descriptors, call.stack) / name
    if {name, *parts_of(copied)} != set(memory.descriptors):
        raise LoadError(
            f"{printable(str(display_name))}: the file was changed while it was loaded; load it again",
            path=str(display_name),
        )
    return copied


def private_copy(path: Path, stack: ExitStack) -> Path:
    """Copy a checkpoint into memory of this process, and return the path of the copy. Not collective."""
    channel = SingleProcessChannel(identity_from_environment())
    stack.callback(channel.close)
    call = CallContext(channel, Settings.from_environment(), stack)
    copied = with_node_copy(hold(path, None, stack), path, call, must_fit=False)
    assert copied is not None
    return copied


def settled(
    path: Path,
    file: FetchedFile,
    map_location: Any,
    call: CallContext,
    *,
    mmap: bool | None,
) -> Path:
    """Return the path to load a checkpoint from, so that no tensor stays mapped to a file that others may change.

    The path leads to the file itself (opened by `hold` if another user could replace it), or to a copy in the node's
    memory (`with_node_copy`).

    Args:
        path: path of the checkpoint.
        file: the fetched file.
        map_location: any form that torch.load takes, already resolved for this rank.
        call: context of the call (see `with_node_copy`).
        mmap: the caller's ``mmap=``. True keeps this user's own file mapped; False makes private copies later.
    """
    held = hold(path, file.sha256, call.stack, file.identity)
    copy = partial(with_node_copy, held, path, call)
    if held.is_changeable and not (mmap is False and file.sha256 is None):
        return copy(sha256=file.sha256, must_fit=False) or held.loaded_by_name(call.stack)
    if mmap is not None or not (reason := why_copied(held.path, map_location, is_published=file.is_published)):
        return held.loaded_by_name(call.stack)
    copied = copy()
    _logger.debug("%s: %s: %s", printable(str(path)), reason, "copied into memory" if copied else "mapped")
    if copied is None:
        level = logging.INFO if file.is_published else logging.WARNING
        advice = "it must not be rewritten in place while this process uses it"
        text = "%s: %s; there is too little free memory for a copy, so it is mapped: %s"
        _logger.log(level, text, printable(str(path)), reason, advice)
    return copied or held.loaded_by_name(call.stack)


def read_in_place(path: Path, file: FetchedFile, call: CallContext, *, mmap: bool | None) -> tuple[Path, bool]:
    """Return the path to read tensors from, none of which stays mapped, and whether tensors may be mapped for a moment.

    Unlike `settled`, copy nothing because of a network filesystem: a rank may need only a small part of a large file.
    Only a verified file that another user may change is copied, so that the hashed bytes are the loaded bytes.

    Args:
        path: path of the checkpoint.
        file: the fetched file.
        call: context of the call (see `with_node_copy`).
        mmap: the caller's ``mmap=``; None maps no file that may change, or whose server may fail.
    """
    held = hold(path, file.sha256, call.stack, file.identity)
    if held.is_changeable and file.sha256 is not None:
        copied = with_node_copy(held, path, call, sha256=file.sha256, must_fit=False)
        assert copied is not None
        return copied, True
    is_safe = not held.is_changeable and file.is_published and all(map(_is_on_local_disk, all_files(held.path)))
    return held.loaded_by_name(call.stack), mmap is not None or is_safe


def _copy(source: int, target: int, size_bytes: int, display_name: str, call: CallContext) -> None:
    begins = range(0, size_bytes, _STRIPE_BYTES)
    source_file, target_file = _Duplicate(source), _Duplicate(target)
    with Readers(min(_THREADS, len(begins))) as readers:
        pending = [
            readers.submit(
                partial(
                    _copy_stripe, source_file, target_file, begin, min(begin + _STRIPE_BYTES, size_bytes), display_name
                )
            )
            for begin in begins
        ]
        for number, stripe in enumerate(pending):

            def check_cancelled(done: int = number) -> None:
                call.report(Progress("loading", done * _STRIPE_BYTES, size_bytes))

            await_reader(stripe, check_cancelled, call.settings.progress_seconds, display_name)
            check_cancelled()


class _Duplicate:
    """A descriptor of its own for an open file, closed with the last reference to this object.

    A reader thread may still be inside a read when the call has given the file up. Were its descriptors closed by
    then, and their numbers used again, the thread would write into whatever file has them now.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self.descriptor)


def _copy_stripe(source: _Duplicate, target: _Duplicate, begin: int, end: int, display_name: str) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    while begin < end:
        count = os.preadv(source.descriptor, [buffer[: end - begin]], begin)
        if not count:
            raise LoadError(f"{display_name}: the file was truncated while it was loaded")
        written = 0
        while written < count:
            written += os.pwrite(target.descriptor, buffer[written:count], begin + written)
        begin += count


def _verify(descriptor: int, size_bytes: int, sha256: str, path: Path, owner_uid: int, call: CallContext) -> None:
    """Verify the copy, not the file: the hashed bytes must be the loaded bytes."""
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(_STRIPE_BYTES)), 0
    while count := os.preadv(descriptor, [buffer], done):
        digest.update(buffer[:count])
        done += count
        call.report(Progress("hashing", done, size_bytes))
    if digest.hexdigest() != sha256:
        display_name, owner = printable(str(path)), name_of(owner_uid)
        raise DigestMismatchError(
            f'invalid hash value (expected "{sha256}", got "{digest.hexdigest()}"): {display_name} belongs to {owner}, '
            "and was changed after it was verified",
            expected=sha256,
            got=digest.hexdigest(),
            path=str(path),
        )


def _fits(sizes: Collection[int]) -> bool:
    free = available_bytes()
    return free is None or sum(sizes) <= _MAX_SHARE_OF_FREE_MEMORY * free


def _is_on_local_disk(path: Path) -> bool:
    with wrap_read_errors(path), path.open("rb", buffering=0) as file:
        return is_on_local_disk(file.fileno())


def _stays_on_cpu(path: Path, map_location: Any) -> bool:
    """Return whether tensors may stay views of the mapped file; True if only a load would tell."""
    file_format = sniff(path)
    if file_format not in _MAPPED_FORMATS:
        return False
    if not goes_by_tags(map_location) or visible_accelerator() is None:
        return True
    if file_format != "torch_zip":  # all tensors in safetensors files count as saved on the CPU
        return location_of(map_location, "cpu") == "cpu"
    try:
        with path.open("rb", buffering=0) as file:
            index = read_zip_index(LocalSource(file.fileno()), path.name, is_remote=False)
    except (NotUnderstoodError, BrokenFileError):
        return True
    return any(location_of(map_location, storage.location) == "cpu" for storage in index.storages)
