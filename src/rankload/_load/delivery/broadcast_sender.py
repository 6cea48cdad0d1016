"""`delivery="broadcast"` into modules: the source sends headers first and, if everything fits, then the data.

The headers contain everything that the index is read from. So every rank plans its own load, as if it had the file.
Then the data follows in buckets, which are pieces of the file, and each rank takes out its own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from rankload._coordination.call_context import CallContext
from rankload._formats.index import Index
from rankload._load.broadcast.header import MAX_HEADER_BYTES, BroadcastHeader
from rankload._load.broadcast.headers_first import send_header, send_kept
from rankload._load.broadcast.whole_file import send_files
from rankload._load.delivery.strategy import DeliveryStrategy, LoadPlan
from rankload._load.device.readers import Limits
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.node.parts import parts_of
from rankload._load.streams.buckets import Range, cut, header_ranges, is_kept, tensor_ranges
from rankload._load.streams.run import ReportBytes, read_all
from rankload._relay.blocks import FileBlock
from rankload._relay.relay import Relay

if TYPE_CHECKING:
    from rankload._load.delivery.group_stream import GroupStream

#: Posted by a rank that needs tensors which the source does not need.
ALL_KEY = "broadcast/all"


class BroadcastSender(DeliveryStrategy):
    """The source of a broadcast: it has the file, and loads its own tensors from the file.

    Args:
        files: files of the checkpoint.
        relay: relay to the other ranks.
        call: context of the call.
        group: sends the tensors in place of the relay, if given.
    """

    def __init__(self, files: CheckpointFiles, relay: Relay, call: CallContext, group: GroupStream | None) -> None:
        self.path, self.files, self.may_share, self.delivery = files.path, files, True, "broadcast"
        self._relay, self._channel, self._limits = relay, call.channel, Limits.of(call.identity, call.settings)
        self._group = group
        self._index: Index | None = None
        self._kept: dict[str, list[Range]] = {}
        self._ranges: dict[str, list[Range]] = {}
        call.report_loading()  # not a declared wait: a stuck source must be noticed

    @override
    def prepare(self, plan: LoadPlan) -> None:
        """Send the headers, for the checkpoint fits this rank's module. Without an index, send whole files."""
        if self._group is not None:
            self._group.prepare(plan)
        index, header, text = plan.index, None, b""
        if index is not None:
            sizes = {file: self.files.source(file).size_bytes for file in self._file_names(index)}
            self._kept = header_ranges(sizes, index.storages)
            if any(not is_kept(entry, self._kept) for entry in self.files.used):
                index = None  # a hook, or extra state, reads tensors early, on every rank
            else:
                self._ranges = tensor_ranges(plan.entries, self._kept)
                header = BroadcastHeader(
                    self.files.name, self.files.display_name, sizes, False, self._kept, self._ranges
                )
                text = header.as_json()
        if header is None or len(text) > MAX_HEADER_BYTES:
            self._send_whole()
            return
        self._index = index
        send_header(self._relay, self._channel, text)
        send_kept(self._relay, header, lambda file: self.files.source(file).descriptor)

    @override
    def on_agreement(self) -> None:
        if self._group is not None:
            self._group.check_agreement()

    @override
    def execute(self, copies: Sequence[TensorCopy], report: ReportBytes) -> int:
        """Send the data, then read this rank's own tensors."""
        if self._index is not None:
            tensors = self._index.tensors.values()
            if self._channel.has(ALL_KEY):
                self._ranges = tensor_ranges(tensors, self._kept)
            if self._group is not None:
                coming = [copy for copy in copies if self._is_sent(copy)]
                done = self._group.run(self._ranges, tensors, coming, self.files)
                here = [copy for copy in copies if not self._is_sent(copy)]
                return done + read_all(here, lambda more: report(done + more), self._limits)
            for bucket in cut(self._ranges, tensors):
                self._relay.send(FileBlock(self.files.source(bucket.file).descriptor, bucket.begin, len(bucket)))
        return read_all(copies, report, self._limits)

    def _is_sent(self, copy: TensorCopy) -> bool:
        """Return whether the other ranks get this tensor after the headers."""
        saved = copy.saved.in_file
        return saved is not None and saved.entry.length > 0 and not is_kept(saved.entry, self._kept)

    def _file_names(self, index: Index) -> list[str]:
        return list(dict.fromkeys((self.files.name, *index.byte_orders)))

    def _send_whole(self) -> None:
        path = self.files.path
        sizes = {name: (path.parent / name).stat().st_size for name in (path.name, *parts_of(path))}
        header = BroadcastHeader(path.name, self.files.display_name, sizes, True, {}, {})
        send_header(self._relay, self._channel, header.as_json())
        send_files(self._relay, path.parent, sizes)
