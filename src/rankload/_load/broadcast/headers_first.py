"""Send what an index is read from before any tensor: first a description, then headers and small storages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from rankload._coordination.channel import Channel
from rankload._load.broadcast.header import MAX_HEADER_BYTES, BadHeaderError, BroadcastHeader, read_header
from rankload._load.node.memory_file import make_memory_file, writable
from rankload._relay.blocks import BytesBlock, FileBlock
from rankload._relay.relay import Relay
from rankload.errors import LoadError

#: Size of the header's length, which comes first.
_LENGTH_BYTES = 8

#: Posted by the source when the header is on its way. Before, the source plans its load, which may take longer than the
#: longest time without a byte.
_COMING_KEY = "broadcast/coming"


def send_header(relay: Relay, channel: Channel, text: bytes) -> None:
    """Send a header, as `BroadcastHeader.as_json` encodes it."""
    channel.post(_COMING_KEY, {})
    for block in (len(text).to_bytes(_LENGTH_BYTES, "little"), text):  # the receiver expects these two blocks
        relay.send(BytesBlock(memoryview(block)))


def receive_header(
    relay: Relay, channel: Channel, source: int, sizes: Mapping[str, int], display_name: str
) -> BroadcastHeader:
    """Receive and check what `send_header` sends.

    Args:
        relay: relay from the source.
        channel: channel of the call.
        source: rank of the source.
        sizes: announced sizes of the source's files in bytes, by name.
        display_name: name of the checkpoint, for messages.

    Raises:
        LoadError: the header is invalid.
    """
    channel.wait_for(_COMING_KEY, from_rank=source)
    try:
        length = int.from_bytes(_receive_bytes(relay, _LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise BadHeaderError(f"it has {length} bytes")
        return read_header(_receive_bytes(relay, length), sizes)
    except BadHeaderError as error:
        raise LoadError(
            f"{display_name}: rank {source} sent an invalid broadcast header: {error}; check that all ranks run the "
            "same version of rankload",
            source_rank=source,
        ) from error


def send_kept(relay: Relay, header: BroadcastHeader, descriptor_of: Callable[[str], int]) -> None:
    """Send the ranges that come with the header.

    Args:
        relay: relay to the other ranks.
        header: the description that was sent.
        descriptor_of: returns a file's descriptor by its name.
    """
    for file, ranges in header.kept.items():
        for begin, end in ranges:
            relay.send(FileBlock(descriptor_of(file), begin, end - begin))


def receive_kept(relay: Relay, header: BroadcastHeader, stack: ExitStack) -> dict[str, int]:
    """Receive what `send_kept` sends; return descriptors of sparse files in memory, by name. ``stack`` closes them."""
    descriptors = {name: make_memory_file(size_bytes, stack) for name, size_bytes in header.sizes.items()}
    for name, ranges in header.kept.items():
        for begin, end in ranges:
            with writable(descriptors[name], begin, end) as part:
                relay.receive(part)
    return descriptors


def _receive_bytes(relay: Relay, length: int) -> bytes:
    received = bytearray(length)
    relay.receive(memoryview(received))
    return bytes(received)
