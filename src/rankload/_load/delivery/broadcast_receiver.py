"""`delivery="broadcast"` into modules: the receiving ranks (see `broadcast_sender`)."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from rankload._coordination.call_context import CallContext
from rankload._formats.entry import TensorEntry
from rankload._formats.index import Index
from rankload._formats.source import LocalSource
from rankload._load.broadcast.header import BroadcastHeader
from rankload._load.broadcast.headers_first import receive_header, receive_kept
from rankload._load.broadcast.whole_file import receive_files
from rankload._load.delivery.broadcast_sender import ALL_KEY
from rankload._load.delivery.strategy import DeliveryStrategy, LoadPlan
from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.node.memory_file import folder_of, make_memory_file
from rankload._load.streams.assemble import TensorAssemblers
from rankload._load.streams.buckets import BUCKET_BYTES, cut, is_kept, tensor_ranges
from rankload._load.streams.run import ReportBytes, read_all
from rankload._relay.relay import Relay
from rankload.errors import LoadError

if TYPE_CHECKING:
    from rankload._load.delivery.group_stream import GroupStream


class BroadcastReceiver(DeliveryStrategy):
    """A rank that does not have the file, and receives it.

    Args:
        relay: this rank's place in the chain.
        source: rank of the source.
        announced: result of `announce`.
        call: context of the call.
        group: brings the tensors in place of the relay, if given.
    """

    def __init__(
        self, relay: Relay, source: int, announced: Mapping[str, Any], call: CallContext, group: GroupStream | None
    ) -> None:
        self._group, self._relay, self._channel = group, relay, call.channel
        self._limits = Limits.of(call.identity, call.settings)
        self._index: Index | None = None
        self.path, self.delivery = None, "broadcast"
        header = receive_header(relay, call.channel, source, announced["sizes"], announced["shown"])
        self._ranges = header.ranges
        self.files = self._receive(header, announced["sha256"], call.stack)
        self.may_share = not isinstance(self.files, ReceivedFiles)

    @override
    def prepare(self, plan: LoadPlan) -> None:
        """Tell the source if this rank needs more tensors than the source is going to send."""
        if self._group is not None:
            self._group.prepare(plan)
        self._index = plan.index
        if not all(self.files.has(entry) or is_kept(entry, self._ranges) for entry in plan.entries):
            self._channel.post(ALL_KEY, {})

    @override
    def on_agreement(self) -> None:
        if self._group is not None:
            self._group.check_agreement()

    @override
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        """Take this rank's tensors out of the stream, and forward the stream."""
        here = [copy for copy in copies if copy.saved.is_here]
        moved = read_all(here, report, self._limits)
        if not isinstance(self.files, ReceivedFiles):
            return moved
        assert self._index is not None
        tensors = self._index.tensors.values()
        if self._channel.has(ALL_KEY):
            self._ranges = tensor_ranges(tensors, self.files.kept)
        coming = [copy for copy in copies if not copy.saved.is_here]
        if self._group is not None:
            self._group.run(self._ranges, tensors, coming, self.files)
        else:
            self._take_out(coming, tensors)
        return moved + sum(copy.region.element_count * copy.saved.dtype.itemsize for copy in coming)

    def _take_out(self, copies: Sequence[TensorCopy], tensors: Collection[TensorEntry]) -> None:
        """Take tensors out of the relay's stream, which is forwarded meanwhile."""
        buckets = cut(self._ranges, tensors)
        assemblers = TensorAssemblers(copies, buckets)
        content = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device="cpu")
        memory = memoryview((ctypes.c_ubyte * BUCKET_BYTES).from_address(content.data_ptr())).cast("B")
        for bucket in buckets:
            self._relay.receive(memory[: len(bucket)])
            assemblers.take(bucket, content.narrow(0, 0, len(bucket)))
        assemblers.check_empty()

    def _receive(self, header: BroadcastHeader, digests: Mapping[str, str], stack: ExitStack) -> CheckpointFiles:
        """Receive the headers, or whole files."""
        if header.is_whole:
            descriptors = {name: make_memory_file(size_bytes, stack) for name, size_bytes in header.sizes.items()}
            receive_files(self._relay, descriptors, header.sizes, digests)
            files = CheckpointFiles(folder_of(descriptors, stack) / header.name, stack)
            files.display_name = header.display_name
            return files
        return ReceivedFiles(header, receive_kept(self._relay, header, stack), stack)


class ReceivedFiles(CheckpointFiles):
    """A checkpoint's files in memory, of which only the headers have arrived.

    Args:
        header: the source's description of the broadcast.
        descriptors: descriptors of the sparse files in memory, by name.
        stack: see `CheckpointFiles`.
    """

    def __init__(self, header: BroadcastHeader, descriptors: Mapping[str, int], stack: ExitStack) -> None:
        super().__init__(Path(header.name), stack)
        self.display_name, self.kept = header.display_name, header.kept
        self._sources = {file: LocalSource(descriptor) for file, descriptor in descriptors.items()}
        self._content = folder_of(descriptors, stack) / header.name

    @override
    def has(self, entry: TensorEntry) -> bool:
        return not entry.length or is_kept(entry, self.kept)

    @override
    def load(self, *, weights_only: bool, mmap: bool | None) -> Any:
        """Raise LoadError: the tensors are not here."""
        raise LoadError(
            f"{self.display_name}: this rank has to load the whole file, but the source sends only tensors: the adapt= "
            "of the ranks differ; pass the same adapt= on all ranks, or delivery='read'"
        )

    @override
    def note_use(self, entry: TensorEntry) -> None:
        if not self.has(entry):
            raise LoadError(
                f"{self.display_name}: tensor {entry.name!r} is needed before it has arrived: a hook of the module, or "
                "adapt=, reads it on this rank, but not on the source; pass delivery='read'",
                tensor=entry.name,
            )
