"""Read files on network filesystems into the page cache, once per node, before all ranks map them.

Page faults of several ranks request small pieces in no order. A file server is fast with large blocks in order, several
at a time.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rankload._cache.files import wrap_read_errors
from rankload._coordination.channel import Channel
from rankload._load.device.readers import Readers, await_reader
from rankload._platform.host import kernel_id
from rankload._platform.linux import is_on_local_disk, resident_pages
from rankload._text import printable
from rankload._types import Progress

_logger = logging.getLogger("rankload")

#: Size of one read, and number of reader threads.
_BLOCK_BYTES = 8 << 20
_THREADS = 4


def read_ahead(paths: Sequence[Path], channel: Channel, progress_seconds: float) -> None:
    """Read files into this node's page cache if they are on a network filesystem. Collective over a node's ranks.

    One rank reads the blocks that are missing from the page cache; the others wait.

    Args:
        paths: paths of the files.
        channel: channel of the call.
        progress_seconds: longest time without an answer of a file.

    Raises:
        ProgressTimeoutError: a file does not answer.
        CacheError: a file cannot be read.
    """
    remote = [path for path in paths if not _is_local(path)]
    if not remote:
        return
    with wrap_read_errors(remote[0]):
        status = remote[0].stat()  # the key has no path: each rank that holds a file open has its own path to it
    key = f"read ahead/{kernel_id()}/{status.st_dev}-{status.st_ino}"
    reader = channel.claim(key)
    if reader != channel.identity.rank:
        channel.wait_for(f"{key}/done", from_rank=reader)
        return
    for path in remote:
        _read(path, channel, progress_seconds)
    channel.post(f"{key}/done", {})


def _is_local(path: Path) -> bool:
    with wrap_read_errors(path), path.open("rb", buffering=0) as file:
        return is_on_local_disk(file.fileno())


def _read(path: Path, channel: Channel, progress_seconds: float) -> None:
    with wrap_read_errors(path), path.open("rb", buffering=0) as file:
        blocks = _absent_blocks(file.fileno())
        _logger.debug(
            "%s: reading %d blocks of %d bytes ahead, over the network", printable(str(path)), len(blocks), _BLOCK_BYTES
        )
        with Readers(min(_THREADS, len(blocks))) as readers:
            pending = [readers.submit(partial(os.pread, file.fileno(), _BLOCK_BYTES, begin)) for begin in blocks]
            for number, block in enumerate(pending):

                def check_cancelled(done: int = number) -> None:
                    channel.report(Progress("loading", done * _BLOCK_BYTES, len(blocks) * _BLOCK_BYTES))

                await_reader(block, check_cancelled, progress_seconds, str(path))
                check_cancelled()


def _absent_blocks(descriptor: int) -> list[int]:
    """Return the offsets of the blocks with a page that is not in the page cache."""
    size_bytes = os.fstat(descriptor).st_size
    pages_per_block = _BLOCK_BYTES // mmap.PAGESIZE
    resident = resident_pages(descriptor, size_bytes)
    begins = range(0, size_bytes, _BLOCK_BYTES)
    if resident is None:
        return list(begins)
    return [
        begin
        for number, begin in enumerate(begins)
        if 0 in resident[number * pages_per_block : (number + 1) * pages_per_block]
    ]
