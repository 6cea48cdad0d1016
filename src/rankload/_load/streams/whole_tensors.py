"""Upload whole tensors in buckets. A bucket is a piece of the file, read at once, however many tensors it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.sharing.gather_group import GatherGroup
from rankload._load.sharing.shared_reads import SharedRead, bucket_bytes, read_shared
from rankload._load.streams.assemble import TensorAssemblers, is_dense
from rankload._load.streams.buckets import Bucket, cut, tensor_ranges


def is_good_as_it_is(saved: FileTensor) -> bool:
    """Return whether a tensor's bytes can be used unchanged: here, dense, and in this machine's byte order."""
    return saved.is_here and saved.is_native and is_dense(saved.entry)


def is_of_whole(copy: TensorCopy) -> bool:
    """Return whether a copy is of a whole tensor whose bytes can be used unchanged."""
    saved = copy.saved.in_file
    return saved is not None and is_good_as_it_is(saved) and copy.region.shape == saved.entry.shape


def upload_whole(
    copies: Sequence[TensorCopy], device: torch.device, limits: Limits, report: Callable[[int], None]
) -> int:
    """Read whole tensors into one device; return the bytes that were read.

    Besides the tensors, the device holds two buckets, and one bucket's tensors if dtypes are converted.

    Args:
        copies: copies for which `is_of_whole` is True.
        device: device of all destinations.
        limits: number of reader threads, and longest time without progress.
        report: called with the bytes done so far; raises another rank's error.

    Raises:
        LoadError: the file ended early.
        CacheError: the file cannot be read.
    """
    alone = GatherGroup()
    display_name = next(copy.saved.in_file.files.display_name for copy in copies if copy.saved.in_file is not None)
    read = SharedRead(cut_whole(copies, bucket_bytes(alone.count)), alone)
    return read_shared([read], device, limits, report, display_name)


class WholeTensors:
    """A bucket of whole tensors: a piece of a file.

    Args:
        bucket: the piece.
        files: files of the checkpoint.
        assemblers: take the tensors out of all buckets, in order.
    """

    def __init__(self, bucket: Bucket, files: CheckpointFiles, assemblers: TensorAssemblers) -> None:
        self._bucket, self._files, self._assemblers = bucket, files, assemblers

    def __len__(self) -> int:
        return len(self._bucket)

    def read(self, address: int, begin: int, end: int) -> int:
        """Read bytes ``begin`` to ``end`` of the piece to an address in memory; return their number."""
        self._files.read(self._bucket.file, address, self._bucket.begin + begin, end - begin, what="its tensors")
        return end - begin

    def finish(self, content: torch.Tensor) -> None:
        """Pass the bytes of the piece, ``uint8[n]``, to the assemblers."""
        self._assemblers.take(self._bucket, content)


def cut_whole(copies: Sequence[TensorCopy], size: int) -> list[WholeTensors]:
    """Cut whole tensors into buckets of at most ``size`` bytes. Ranks that want the same tensors get the same buckets.

    Args:
        copies: copies for which `is_of_whole` is True.
        size: a multiple of the alignment of shares.
    """
    tensors = [copy.saved.in_file for copy in copies if copy.saved.in_file is not None]
    entries = [saved.entry for saved in tensors]
    buckets = cut(tensor_ranges(entries, {}), entries, size)
    assemblers = TensorAssemblers(copies, buckets)
    return [WholeTensors(bucket, tensors[0].files, assemblers) for bucket in buckets]
