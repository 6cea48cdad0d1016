"""Refuse archive members that torch's reader would misread, or unpack to far too many bytes.

Some members look like a folder, have no packed bytes, or cannot be inflated. For these, torch's reader (miniz, through
caffe2/serialize/inline_container.cc) reports success, but leaves its output buffer unchanged: old contents of this
process's memory would become weights. torch's reader also sets no limit on the unpacked size of tensors.
"""

from __future__ import annotations

import zlib

from rankload._formats.broken import BrokenFileError
from rankload._formats.source import Source, read_exactly
from rankload._formats.unpack_limit import MAX_RATIO, unpacked_limit
from rankload._formats.zip_archive import Directory, Member, payload_offset

_CHUNK_BYTES = 1 << 20


def check_listing(directory: Directory, packed_bytes: int) -> None:
    """Check the central directory's facts about each member. Reads nothing.

    Args:
        directory: directory of an archive in torch's format.
        packed_bytes: size of the archive.

    Raises:
        BrokenFileError: torch's reader could see other members, a folder has bytes, a member is encrypted, or the
            unpacked members would be far larger than the archive.
    """
    if directory.is_ambiguous:  # torch's reader could see members that were not checked
        raise BrokenFileError("zip archive in which other readers could see other members")
    unpacked_bytes = 0
    for member in directory.members:
        if member.is_folder and member.size_bytes:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} is a folder, and has bytes)")
        if member.is_encrypted:  # a mapped member would become weights without decryption
            raise BrokenFileError(f"encrypted zip archive ({member.name!r})")
        if not member.is_stored:
            unpacked_bytes += member.size_bytes
    if unpacked_bytes > unpacked_limit(packed_bytes):
        raise BrokenFileError(
            f"zip archive of {packed_bytes} bytes whose compressed members would have {unpacked_bytes} unpacked; "
            f"rankload allows {MAX_RATIO} times its size, or {unpacked_limit(0) >> 20} MiB"
        )


def check_compressed(source: Source, directory: Directory) -> None:
    """Inflate every compressed member once, and keep nothing.

    Raises:
        BrokenFileError: a member cannot be inflated, or not to its declared size.
    """
    for member in directory.members:
        if not member.is_stored and _inflated_bytes(source, directory, member) != member.size_bytes:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} has another length than it declares)")


def _inflated_bytes(source: Source, directory: Directory, member: Member) -> int:
    """Return the number of inflated bytes of a member. Counting stops beyond the declared size."""
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
