"""Read bytes that several ranks want: each rank reads a share of every bucket, and they exchange the shares.

Reads, copies to the device, exchanges and copies into tensors overlap: threads read ahead, and while the ranks exchange
one bucket, the next one arrives on the device. So each byte is read once, and crosses PCIe once, for all sharing ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rankload._load.device import pinned
from rankload._load.device.readers import Limits
from rankload._load.sharing.exchange_group import ExchangeGroup
from rankload._load.sharing.gather_group import ALIGNMENT_BYTES

if TYPE_CHECKING:
    import torch.distributed as dist

#: Smallest size of a bucket, and of a rank's share of one: small messages do not use the whole bandwidth of a network.
#: (A share also has to fit into one of the buffers of `pinned.staged`.)
_BUCKET_BYTES = 32 << 20
_SHARE_BYTES = 4 << 20

#: Largest size of a bucket, which the devices of large jobs have to hold twice.
_MAX_BUCKET_BYTES = 512 << 20


class SharedBucket(Protocol):
    """A piece of what the ranks want."""

    def __len__(self) -> int:
        """Return the number of bytes, at most `bucket_bytes` of the sharing ranks."""

    def read(self, address: int, begin: int, end: int) -> int:
        """Read a share to an address in memory, and return how many bytes that took. Called on a reader thread.

        Args:
            address: address in memory, with room for ``end - begin`` bytes.
            begin: offset of the share's first byte in the bucket, a multiple of `ALIGNMENT_BYTES`.
            end: offset one past its last byte.
        """

    def finish(self, content: torch.Tensor) -> None:
        """Copy the bucket's bytes (``uint8[n]``, on the device) to where they belong, on the current stream."""


@dataclass(frozen=True)
class SharedRead:
    """What one set of ranks reads together.

    Attributes:
        buckets: the same on all ranks.
        sharers: the ranks.
    """

    buckets: Sequence[SharedBucket]
    sharers: ExchangeGroup


def bucket_bytes(sharer_count: int) -> int:
    """Return the size of a bucket: ``max(32 MiB, 4 MiB × ranks)``, within the limits of a buffer and of a device."""
    wanted = min(max(_BUCKET_BYTES // sharer_count, _SHARE_BYTES), _MAX_BUCKET_BYTES // sharer_count)
    return max(1, min(wanted, pinned.BUFFER_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES * sharer_count


def read_shared(
    reads: Sequence[SharedRead],
    device: torch.device,
    limits: Limits,
    report: Callable[[int], None],
    display_name: str,
    meet: Callable[[], object] = lambda: None,
) -> int:
    """Read what this rank shares with others; return the bytes that it has read itself. Collective over the sharers.

    Besides the results, the device holds two buckets. A read error is raised after all collectives, so the process
    groups stay usable. After any other error they are not usable: ranks may be out of step.

    Args:
        reads: in an order on which all ranks agree.
        device: device of the buckets.
        limits: number of reader threads, and longest time without progress.
        report: called with the bytes done so far; raises another rank's error.
        display_name: name of the checkpoint, for messages.
        meet: waits until all ranks of the call have arrived. A rank that is short of memory fails before.

    Raises:
        LoadError: a file ended early.
        CacheError: a file cannot be read.
        RankLostError, ProgressTimeoutError: see `ExchangeGroup.end`.
    """
    shares = [_Share(bucket, read.sharers) for read in reads for bucket in read.buckets]
    largest_bytes = max((share.bytes_of_all for share in shares), default=0)
    memory = [torch.empty(largest_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    done = 0
    before: _UnderWay | None = None

    def check_cancelled() -> None:
        report(done)

    meet()
    for read in reads:
        read.sharers.warm_up(device, check_cancelled)
    for share, content in _filled(shares, device, limits, check_cancelled, display_name):
        whole = memory[0].narrow(0, 0, share.bytes_of_all)
        whole.narrow(0, share.begin, len(share)).copy_(content, non_blocking=True)
        now = _UnderWay(share, whole, share.sharers.begin(whole, check_cancelled))
        if before is not None:
            before.finish(check_cancelled)
        before = now
        memory.reverse()
        done += share.bytes_read
        check_cancelled()
    if before is not None:
        before.finish(check_cancelled)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    for share in shares:
        share.raise_error()
    return done


def _filled(
    shares: Sequence[_Share], device: torch.device, limits: Limits, check_cancelled: Callable[[], None], name: str
) -> Iterator[tuple[_Share, torch.Tensor]]:
    """Yield each share with its bytes. A rank that only receives takes no memory for its empty shares."""
    if any(map(len, shares)):
        yield from pinned.staged(shares, device, limits, check_cancelled, name)
    else:
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        yield from ((share, nothing) for share in shares)


class _Share:
    """This rank's share of a bucket.

    Attributes:
        bucket: the bucket.
        sharers: the ranks that share it.
        bytes_of_all: bytes of all shares.
        begin: offset of this rank's share in the bucket.
        bytes_read: bytes that have been read.
    """

    def __init__(self, bucket: SharedBucket, sharers: ExchangeGroup) -> None:
        self.bucket, self.sharers = bucket, sharers
        self.bytes_of_all, self.begin, self._end = sharers.share_of(len(bucket))
        self.bytes_read = 0
        self._error: Exception | None = None

    def __len__(self) -> int:
        return self._end - self.begin

    def fill(self, address: int) -> None:
        """Read the share to an address in memory. Keep an error for `raise_error`."""
        try:
            if len(self):
                self.bytes_read = self.bucket.read(address, self.begin, self._end)
        except Exception as error:
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class _UnderWay:
    """A bucket that the ranks are exchanging."""

    share: _Share
    content: torch.Tensor
    work: dist.Work | None

    def finish(self, check_cancelled: Callable[[], None]) -> None:
        """Wait for the exchange, then copy the bucket to where it belongs."""
        self.share.sharers.end(self.work, self.content, check_cancelled)
        self.share.bucket.finish(self.content)
