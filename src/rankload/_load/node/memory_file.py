"""Anonymous files in memory. torch.load and the index readers open them like files on disk."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rankload._platform.scratch import descriptor_path, scratch_file, scratch_folder


def make_memory_file(size_bytes: int, stack: ExitStack) -> int:
    """Make a sparse file in memory, filled with zeros, and return its descriptor.

    The pages stay as long as this descriptor, a descriptor in another process, or a mapping exists.
    """
    try:
        descriptor = os.memfd_create("rankload", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # not Linux, or a sandbox without this system call
        with scratch_file("memory for a checkpoint", size_bytes) as file:
            descriptor = os.dup(file.fileno())
    stack.callback(os.close, descriptor)
    os.ftruncate(descriptor, size_bytes)
    return descriptor


@contextmanager
def writable(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    """Map bytes ``begin`` to ``end`` of a file for writing."""
    if begin == end:
        yield memoryview(b"")
        return
    first = begin - begin % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(descriptor, end - first, offset=first)
    whole = memoryview(mapping)
    part = whole[begin - first :]
    try:
        yield part
    finally:
        with suppress(BufferError):  # the frames of an error keep slices alive; they are released with the error
            part.release()
            whole.release()
            mapping.close()


def folder_of(descriptors: Mapping[str, int], stack: ExitStack) -> Path:
    """Return a folder in which this process can open the files by name. Names may contain folders."""
    return scratch_folder({name: descriptor_path(descriptor) for name, descriptor in descriptors.items()}, stack)


def path_for_others(descriptor: int) -> str:
    """Return a path by which other processes of this user can open a descriptor's file (Linux)."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"
