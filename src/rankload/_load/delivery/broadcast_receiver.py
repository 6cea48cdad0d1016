"""The receivers' side of a broadcast into modules (see `sending`)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rankload._coordination.rank_channel import RankChannel
from rankload._formats.entry import TensorEntry
from rankload._formats.index import Index
from rankload._formats.source import LocalSource
from rankload._load.broadcast.header import LARGEST_HEADER_BYTES, BadHeaderError, Header, read_header
from rankload._load.broadcast.whole_file import receive_files
from rankload._load.delivery.base import Carrier, Plan
from rankload._load.delivery.broadcast_sender import ALL_KEY, COMING_KEY, LENGTH_BYTES
from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import Transfer
from rankload._load.node.memory_file import folder_of, make_memory_file, writable
from rankload._load.streams.assemble import Sinks
from rankload._load.streams.buckets import BUCKET_BYTES, cut, is_kept, tensor_ranges
from rankload._load.streams.run import ReportBytes, read_all
from rankload._relay.relay import Relay
from rankload._settings import Settings
from rankload.errors import LoadError


class Receiving(Carrier):
    """The side of a rank that does not have the file.

    Args:
        relay: from the source, and on to others.
        source: its rank.
        announced: what `announce` returned.
        channel: of the call.
        settings: deadlines.
        closing: lets go of the headers.
    """

    def __init__(
        self,
        relay: Relay,
        source: int,
        announced: Mapping[str, Any],
        channel: RankChannel,
        settings: Settings,
        closing: ExitStack,
    ) -> None:
        self._relay, self._channel, self._limits = relay, channel, Limits.of(channel.identity, settings)
        self._index: Index | None = None
        self.path, self.delivery = None, "broadcast"
        channel.wait_for(COMING_KEY, from_rank=source)
        try:
            header = self._receive_header(announced["sizes"])
        except BadHeaderError as error:
            raise LoadError(
                f"{announced['path']}: rank {source}'s description of what it sends cannot be right: {error}: does it "
                "run another version of rankload?",
                source_rank=source,
            ) from error
        self._ranges = header.ranges
        self.files = self._receive(header, announced["sha256"], closing)
        self.may_share = not isinstance(self.files, ReceivedFiles)

    def planned(self, plan: Plan) -> bool:
        """Tell the source if this rank needs more than it is going to send."""
        self._index = plan.index
        if not all(self.files.has(entry) or is_kept(entry, self._ranges) for entry in plan.entries):
            self._channel.post(ALL_KEY, {})
        return False

    def move(self, transfers: Sequence[Transfer], report: ReportBytes) -> int:
        """Take out of the stream what is ours, and pass it on."""
        here = [transfer for transfer in transfers if transfer.saved.is_here]
        moved = read_all(here, report, self._limits)
        if not isinstance(self.files, ReceivedFiles):
            return moved
        assert self._index is not None
        tensors = self._index.tensors.values()
        if self._channel.has(ALL_KEY):
            self._ranges = tensor_ranges(tensors, self.files.kept)
        buckets = cut(self._ranges, tensors)
        coming = [transfer for transfer in transfers if not transfer.saved.is_here]
        sinks = Sinks(coming, buckets)
        content = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device="cpu")
        memory = memoryview((ctypes.c_ubyte * BUCKET_BYTES).from_address(content.data_ptr())).cast("B")
        for bucket in buckets:
            self._relay.receive(memory[: len(bucket)])
            sinks.take(bucket, content.narrow(0, 0, len(bucket)))
        sinks.check_empty()
        return moved + sum(transfer.box.element_count * transfer.saved.dtype.itemsize for transfer in coming)

    def _receive_header(self, sizes: Mapping[str, int]) -> Header:
        length = int.from_bytes(self._receive_bytes(LENGTH_BYTES), "little")
        if length > LARGEST_HEADER_BYTES:
            raise BadHeaderError(f"it has {length} bytes")
        return read_header(self._receive_bytes(length), sizes)

    def _receive(self, header: Header, digests: Mapping[str, str], closing: ExitStack) -> CheckpointFiles:
        """Receive the headers, or all."""
        descriptors = {name: make_memory_file(size_bytes, closing) for name, size_bytes in header.sizes.items()}
        if header.is_whole:
            receive_files(self._relay, descriptors, header.sizes, digests)
            files = CheckpointFiles(folder_of(descriptors, closing) / header.name, closing)
            files.shown = header.shown
            return files
        for name, ranges in header.kept.items():
            for begin, end in ranges:
                with writable(descriptors[name], begin, end) as part:
                    self._relay.receive(part)
        return ReceivedFiles(header, descriptors, closing)

    def _receive_bytes(self, length: int) -> bytes:
        received = bytearray(length)
        self._relay.receive(memoryview(received))
        return bytes(received)


class ReceivedFiles(CheckpointFiles):
    """Files of which the headers have come.

    Args:
        header: the source's words on them.
        descriptors: of the files in memory, full of holes.
        closing: see `CheckpointFiles`.
    """

    def __init__(self, header: Header, descriptors: Mapping[str, int], closing: ExitStack) -> None:
        super().__init__(Path(header.name), closing)
        self.shown, self.kept = header.shown, header.kept
        self._sources = {file: LocalSource(descriptor) for file, descriptor in descriptors.items()}
        self._content = folder_of(descriptors, closing) / header.name

    def has(self, entry: TensorEntry) -> bool:
        """See `CheckpointFiles`."""
        return not entry.length or is_kept(entry, self.kept)

    def load(self, *, weights_only: bool, mmap: bool | None) -> Any:
        """Not possible here."""
        raise LoadError(
            f"{self.shown}: this rank wants to load all of it, and the source does not: its adapt= differs; pass "
            "delivery='read', or the same adapt="
        )

    def note_use(self, entry: TensorEntry) -> None:
        """See `CheckpointFiles`."""
        if not self.has(entry):
            raise LoadError(
                f"{self.shown}: tensor {entry.name!r} is wanted before it has come: a hook of the module, or adapt=, "
                "has to see it on this rank, and not on the source; pass delivery='read'",
                tensor=entry.name,
            )
