"""`delivery="broadcast"` of a state dict over the process group, where all ranks put all of it on accelerators.

Headers come over TCP, into a sparse file in each rank's memory. From that the rank makes its tensors, still empty.
Then the process group broadcasts the storages from the source's accelerator to the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from rankload._coordination.call_context import CallContext
from rankload._formats.entry import StorageEntry
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.read_index import read_index
from rankload._formats.sniff import sniff
from rankload._formats.source import LocalSource
from rankload._load.broadcast.header import MAX_HEADER_BYTES, BroadcastHeader
from rankload._load.broadcast.headers_first import receive_header, receive_kept, send_header, send_kept
from rankload._load.broadcast.whole_file import announce
from rankload._load.device.readers import Limits
from rankload._load.node.memory_file import folder_of
from rankload._load.node.parts import parts_of
from rankload._load.sharing.broadcast_group import BroadcastGroup
from rankload._load.sharing.proposal import Proposal, Sharers, group_for
from rankload._load.sharing.shared_reads import bucket_bytes
from rankload._load.state_dict.deferred_storages import DeferredStorages, accelerator_for
from rankload._load.state_dict.gathered_storages import read_together
from rankload._load.state_dict.plain_checkpoint import PlainCheckpoint
from rankload._load.streams.buckets import Range, header_ranges
from rankload._load.values.torch_errors import wrap_load_errors
from rankload._relay.opening import open_relay
from rankload._settings import variable
from rankload._types import FetchedFile
from rankload.errors import LoadError

_WHY = f"{variable('broadcast_over_group')}=1"

#: Longest list of location tags that the source publishes. torch's own tags name devices.
_MAX_TAGS = 100


@dataclass(frozen=True)
class StorageBroadcast:
    """The agreement of all ranks on a broadcast over the process group.

    Attributes:
        files: the source's open files, by name; empty on the other ranks.
        header: the source's description of the broadcast; None on the other ranks.
        device: this rank's accelerator.
        source: rank of the source.
        call: context of the call.
    """

    files: dict[str, LocalSource]
    header: BroadcastHeader | None
    device: torch.device
    source: int
    call: CallContext

    @classmethod
    def agree(
        cls,
        path: Path | None,
        file: FetchedFile | None,
        source: int,
        map_location: Any,
        call: CallContext,
        *,
        mmap: bool | None,
    ) -> Self | None:
        """Return the agreement; None if the whole file has to be broadcast, which is the same on all ranks. Collective.

        Args:
            path: the checkpoint, or the index of one in several files, at the source; None on other ranks.
            file: the file that the source fetched, of which ``path`` may be a copy; None on other ranks.
            source: rank of the source.
            map_location: any form that torch.load takes, already resolved for this rank.
            call: context of the call. Its stack closes the files.
            mmap: as in `read_checkpoint`: with False, storages are copied by torch.

        Raises:
            ArgumentError: there is no process group with a backend for the accelerator.
        """
        channel = call.channel
        files: dict[str, LocalSource] = {}
        header = None
        if path is not None and file is not None:
            header, tags = _described(path, file, files, call.stack)
            channel.post("broadcast/tags", {"tags": tags})
        else:
            tags = channel.wait_for("broadcast/tags", from_rank=source)["tags"]
        device = accelerator_for(map_location, tags) if mmap is not False else None
        proposal = None
        if device is not None:
            proposal = Proposal.make(channel, Sharers.of(group_for(call, device, _WHY)), device, "storages")
        channel.meet("devices are known")
        if device is None or proposal is None or not proposal.holds(channel):
            return None
        return cls(files, header, device, source, call)

    def bring_headers(self, path: Path | None, file: FetchedFile | None) -> tuple[Path, str]:
        """Bring everything but large storages to every rank. Collective. The arguments are those of `agree`.

        Returns:
            This rank's path of the checkpoint, on disk or in memory; and the path at the source, for messages.
        """
        channel, stack = self.call.channel, self.call.stack
        announced = announce(path, file, self.source, channel)
        relay = open_relay(channel, self.source, self.call.settings, takes_part=True)
        assert relay is not None
        if path is not None:
            assert self.header is not None
            send_header(relay, channel, self.header.as_json())
            send_kept(relay, self.header, lambda name: self.files[name].descriptor)
            return path, announced["shown"]
        header = receive_header(relay, channel, self.source, announced["sizes"], announced["shown"])
        descriptors = receive_kept(relay, header, stack)
        return folder_of(descriptors, stack) / header.name, announced["shown"]

    def fill(self, parts: Sequence[DeferredStorages], limits: Limits, display_name: str) -> None:
        """Fill the empty storages of the state dict. Collective.

        Args:
            parts: empty storages, by file of the checkpoint.
            limits: number of reader threads, and longest time without progress.
            display_name: name of the checkpoint, for messages.

        Raises:
            LoadError: the ranks have made different tensors of the same headers.
            RankLostError, ProgressTimeoutError: see `ExchangeGroup.end`.
        """
        channel, group = self.call.channel, group_for(self.call, self.device, _WHY)
        wanted = [part.wanted.get(self.device, []) for part in parts]
        proposal = Proposal.make(channel, Sharers.of(group), self.device, wanted)
        channel.meet("storages are known")
        if not proposal.holds(channel):
            raise LoadError(
                f"{display_name}: {_WHY}: the ranks make different tensors of it: weights_only=, mmap=, and modes of "
                "torch such as FakeTensorMode must be the same on all ranks; else unset the variable"
            )
        sharers = BroadcastGroup.of(group, self.source, self.call.settings)
        buckets = [bucket for part in parts for bucket in part.cut(self.device, bucket_bytes(1))]
        read_together(buckets, sharers, self.device, self.call, limits, display_name)


def _described(
    path: Path, file: FetchedFile, files: dict[str, LocalSource], stack: ExitStack
) -> tuple[BroadcastHeader | None, list[str]]:
    """Describe a broadcast whose storages come later, and open the files.

    Returns:
        The description, and the location tags of all storages; None and no tags if the checkpoint needs torch.load.
    """
    with wrap_load_errors(file.path):
        storages = _storages_built_late(path, files, stack)
    tags = sorted({storage.location for storage in storages})
    sizes = {name: source.size_bytes for name, source in files.items()}
    kept: dict[str, list[Range]] = header_ranges(sizes, storages)
    header = BroadcastHeader(path.name, str(file.path), sizes, False, kept, {})
    if len(tags) > _MAX_TAGS or len(header.as_json()) > MAX_HEADER_BYTES:
        return None, []
    return header, tags


def _storages_built_late(path: Path, files: dict[str, LocalSource], stack: ExitStack) -> Sequence[StorageEntry]:
    """Open all files; return all storages, or nothing if `read_checkpoint` would not make its tensors from indexes."""
    for name in (path.name, *parts_of(path)):
        opened = stack.enter_context((path.parent / name).open("rb", buffering=0))
        files[name] = LocalSource(opened.fileno())
    try:
        for name, source in files.items():
            file_format = sniff(path.parent / name)
            if file_format == "torch_zip":
                PlainCheckpoint(source, name)
            elif file_format not in ("safetensors", "sharded"):
                return ()
        return read_index(files[path.name], path.name, files.__getitem__, is_remote=False).storages
    except NotUnderstoodError:
        return ()
