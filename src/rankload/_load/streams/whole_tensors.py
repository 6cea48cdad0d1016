"""Upload whole tensors to accelerators, bucket by bucket.

If all ranks of a process group want the same tensors, each rank reads and uploads its share of every bucket. The ranks
exchange their shares by an in-place all-gather. So each byte is read once, and crosses PCIe once, for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rankload._load.device.pinned import BUFFER_BYTES, staged
from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.streams.assemble import TensorAssemblers, is_dense
from rankload._load.streams.buckets import Bucket, cut, tensor_ranges
from rankload._load.streams.gather_group import GatherGroup

if TYPE_CHECKING:
    import torch.distributed as dist

#: Size of each of the two buckets in the device's memory.
_BUCKET_BYTES = 32 << 20

#: Shares of a bucket are multiples of this.
_ALIGNMENT_BYTES = 64


def is_good_as_it_is(saved: FileTensor) -> bool:
    """Return whether a tensor's bytes can be used unchanged: here, dense, and in this machine's byte order."""
    return saved.is_here and saved.is_native and is_dense(saved.entry)


def is_of_whole(copy: TensorCopy) -> bool:
    """Return whether a copy is of a whole tensor whose bytes can be used unchanged."""
    saved = copy.saved.in_file
    return saved is not None and is_good_as_it_is(saved) and copy.region.shape == saved.entry.shape


def upload_whole(
    copies: Sequence[TensorCopy],
    device: torch.device,
    limits: Limits,
    report: Callable[[int], None],
    sharers: GatherGroup | None = None,
) -> int:
    """Read whole tensors into one device; return the bytes that this rank has read. Collective over the sharers.

    Besides the tensors, the device holds two buckets, and one bucket's tensors if dtypes are converted. A read error is
    raised after all collectives, so the process group stays usable. After any other error the process group is not
    usable: ranks may be out of step.

    Args:
        copies: copies for which `is_of_whole` is True, in the same order on all sharers.
        device: device of all destinations.
        limits: number of reader threads, and longest time without progress.
        report: called with the bytes done so far; raises another rank's error.
        sharers: ranks that make this call together; None for this rank alone.

    Raises:
        LoadError: the file ended early.
        CacheError: the file cannot be read.
    """
    sharers = sharers or GatherGroup()
    share_bytes = min(BUFFER_BYTES, _BUCKET_BYTES // sharers.count) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
    tensors = [copy.saved.in_file for copy in copies if copy.saved.in_file is not None]
    entries = [saved.entry for saved in tensors]
    buckets = cut(tensor_ranges(entries, {}), entries, share_bytes * sharers.count)
    assemblers = TensorAssemblers(copies, buckets)
    shares = [_Share(tensors[0].files, bucket, sharers) for bucket in buckets]
    memory = [torch.empty(share_bytes * sharers.count, dtype=torch.uint8, device=device) for _ in range(2)]
    done = 0
    before: _UnderWay | None = None

    def check_cancelled() -> None:
        report(done)

    sharers.warm_up(device, check_cancelled)
    for share, content in staged(shares, device, limits, check_cancelled, tensors[0].files.display_name):
        whole = memory[0].narrow(0, 0, share.size * sharers.count)
        own = whole.narrow(0, share.size * sharers.number, share.size)
        own.narrow(0, 0, len(share)).copy_(content, non_blocking=True)
        now = _UnderWay(share.bucket, whole, sharers.begin(whole, own, check_cancelled))
        if before is not None:
            before.finish(sharers, assemblers, check_cancelled)
        before = now
        memory.reverse()
        done += len(share)
        check_cancelled()
    if before is not None:
        before.finish(sharers, assemblers, check_cancelled)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    for share in shares:
        share.raise_error()
    assemblers.check_empty()
    return done


class _Share:
    """This rank's share of a bucket.

    Attributes:
        bucket: the bucket.
        size: bytes of each rank's share; the end of the bucket may shorten the last shares.
    """

    def __init__(self, files: CheckpointFiles, bucket: Bucket, sharers: GatherGroup) -> None:
        self.bucket = bucket
        self.size = -(-len(bucket) // (sharers.count * _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
        self._begin = min(bucket.begin + sharers.number * self.size, bucket.end)
        self._end = min(self._begin + self.size, bucket.end)
        self._files = files
        self._error: Exception | None = None

    def __len__(self) -> int:
        return self._end - self._begin

    def fill(self, address: int) -> None:
        """Read the share to an address in memory. Keep an error for `raise_error`."""
        try:
            self._files.read(self.bucket.file, address, self._begin, len(self), what="its tensors")
        except Exception as error:
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class _UnderWay:
    """A bucket that the ranks are exchanging."""

    bucket: Bucket
    content: torch.Tensor
    work: dist.Work | None

    def finish(self, sharers: GatherGroup, assemblers: TensorAssemblers, check_cancelled: Callable[[], None]) -> None:
        """Wait for the exchange, then copy the tensors out of the bucket."""
        sharers.end(self.work, check_cancelled)
        assemblers.take(self.bucket, self.content)
