"""How the bytes of a checkpoint come to this rank's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from rankload._checkpoint.entry import TensorEntry
from rankload._checkpoint.index import Index
from rankload._deliver.broadcast.receiving import Receiving
from rankload._deliver.broadcast.sending import Sending
from rankload._deliver.broadcast.whole_file import announce, find
from rankload._deliver.files import CheckpointFiles
from rankload._deliver.parts import all_files
from rankload._deliver.read_ahead import read_ahead
from rankload._deliver.reading import ReportBytes, read_all
from rankload._deliver.transfers import Transfer
from rankload._job.channel import RankChannel
from rankload._job.lone import LoneChannel
from rankload._job.relay.opening import open_relay
from rankload._settings import Settings
from rankload._types import Channel


class Carrier(Protocol):
    """One load, seen from one rank: first the files, then the plan, then the bytes.

    Attributes:
        files: the checkpoint's, or what stands for them.
        path: the file that this rank has; None for one that receives.
        may_share: whether tensors may be views of the files.
    """

    path: Path | None
    files: CheckpointFiles
    may_share: bool

    def planned(self, index: Index | None, wanted: Sequence[TensorEntry]) -> None:
        """Take note of what this rank wants, before the ranks meet.

        Args:
            index: the checkpoint's; None where torch.load loads all of it.
            wanted: tensors that are to be moved, or mapped.
        """

    def move(self, transfers: Sequence[Transfer], report: ReportBytes) -> int:
        """Move the bytes, after the ranks have met; return how many were this rank's own."""


class Reading:
    """Each rank reads the file."""

    def __init__(self, files: CheckpointFiles, channel: Channel) -> None:
        self.path: Path | None = files.path
        self.files, self.may_share = files, True
        self._channel = channel
        self._wanted_bytes = 0

    def planned(self, index: Index | None, wanted: Sequence[TensorEntry]) -> None:
        """See `Carrier`."""
        self._wanted_bytes = sum(entry.length for entry in wanted)

    def move(self, transfers: Sequence[Transfer], report: ReportBytes) -> int:
        """See `Carrier`."""
        own = sum(transfer.box.element_count for transfer in transfers)
        if 2 * own >= sum(transfer.saved.shape.numel() for transfer in transfers):  # not one of many shards
            paths = all_files(self.files.path)
            if 2 * self._wanted_bytes >= sum(path.stat().st_size for path in paths):  # nor a part of the checkpoint
                read_ahead(paths, self._channel)
        return read_all(transfers, report)


def open_carrier(
    delivery: str,
    path: Path | None,
    source: int,
    channel: LoneChannel | RankChannel,
    settings: Settings,
    closing: ExitStack,
) -> Carrier:
    """Open what brings the bytes. Collective.

    Args:
        delivery: ``"read"``, or ``"broadcast"`` from one rank's file to all.
        path: the file; None for ranks that did not fetch one.
        source: the rank that broadcasts.
        channel: of the call.
        settings: deadlines.
        closing: closes files.
    """
    if delivery == "read" or not isinstance(channel, RankChannel):
        assert path is not None
        return Reading(CheckpointFiles(path, closing), channel)
    announced = announce(path, source, channel)
    here = path if path is not None else find(announced)
    relay = open_relay(channel, source, settings, takes_part=here is None)
    if here is None:
        assert relay is not None
        return Receiving(relay, channel, closing)
    files = CheckpointFiles(here, closing)
    return Sending(files, relay, channel) if relay is not None else Reading(files, channel)
