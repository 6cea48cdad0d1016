"""Refuse archive members that torch's reader would misread, or unpack to far too much.

For a member that it takes for a folder, of which nothing is packed, or that cannot be inflated, torch's reader (miniz,
through caffe2/serialize/inline_container.cc) reports success and leaves the memory as it was: what this process had
there before becomes weights. And nothing bounds what compressed tensors become.
"""

from __future__ import annotations

import zlib

from rankload._formats.broken import BrokenFileError
from rankload._formats.source import Source, read_exactly
from rankload._formats.unpack_limit import MAX_RATIO, unpacked_limit
from rankload._formats.zip_archive import Directory, Member, payload_offset

_CHUNK_BYTES = 1 << 20


def check_listing(directory: Directory, packed_bytes: int) -> None:
    """Check what the central directory says of each member. Reads nothing.

    Args:
        directory: of an archive in torch's format.
        packed_bytes: size of the archive.

    Raises:
        BrokenFileError: torch's reader could see other members, a folder has bytes, a member is encrypted, or the
            members would take far more room unpacked than the archive.
    """
    if directory.is_ambiguous:  # those would not have been checked
        raise BrokenFileError("zip archive that other readers could read in another way")
    unpacked_bytes = 0
    for member in directory.members:
        if member.is_folder and member.size_bytes:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} is a folder, and has bytes)")
        if member.is_encrypted:  # mapped, it would be weights as it is
            raise BrokenFileError(f"encrypted zip archive ({member.name!r})")
        if not member.is_stored:
            unpacked_bytes += member.size_bytes
    if unpacked_bytes > unpacked_limit(packed_bytes):
        raise BrokenFileError(
            f"zip archive of {packed_bytes} bytes whose compressed members would have {unpacked_bytes} unpacked; "
            f"rankload allows {MAX_RATIO} times its size, or {unpacked_limit(0) >> 20} MiB"
        )


def check_compressed(source: Source, directory: Directory) -> None:
    """Inflate every compressed member once, keeping nothing.

    Raises:
        BrokenFileError: one cannot be inflated, or not to the size that it says.
    """
    for member in directory.members:
        if not member.is_stored and _inflated_bytes(source, directory, member) != member.size_bytes:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} has another length than it says)")


def _inflated_bytes(source: Source, directory: Directory, member: Member) -> int:
    """Return how many bytes a member has, counted up to one more than it says."""
    if not member.is_deflated:
        raise BrokenFileError(f"zip archive in which {member.name!r} is not compressed by deflate")
    offset = payload_offset(source, directory, member)
    end, count = offset + member.stored_bytes, 0
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        while not inflating.eof and count <= member.size_bytes:
            packed = inflating.unconsumed_tail
            if not packed and offset < end:
                packed = read_exactly(source, min(_CHUNK_BYTES, end - offset), offset)
                offset += len(packed)
            inflated = inflating.decompress(packed, _CHUNK_BYTES)
            count += len(inflated)
            if not packed and not inflated:
                break
    except zlib.error as error:
        raise BrokenFileError(f"damaged zip archive ({member.name!r}: {error})") from None
    if not inflating.eof and count <= member.size_bytes:
        raise BrokenFileError(f"damaged zip archive ({member.name!r} is cut off)")
    return count
