"""Read zip archives: torch's format since 1.6, TorchScript, and any other zip.

This reader is stricter than `zipfile`, which accepts an end record anywhere in the last 64 KiB and shifts all offsets
to fit. With `zipfile`, a file cut off right after an archive *inside* it would pass. Here the end record has to end the
file (`_find_end_record` names the exception), and every offset has to be true as written. Only the directory and the
local headers (30 bytes and the name) are read.

Format: APPNOTE.TXT 6.3 (sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rankload._formats.broken import BrokenFileError
from rankload._formats.source import Source, read_exactly

ZipKind = Literal["torch_zip", "torchscript", "single_member_zip", "zip"]

LOCAL_SIGNATURE = b"PK\x03\x04"
END_SIGNATURE = b"PK\x05\x06"

_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_MAX_COMMENT_LENGTH = 0xFFFF
_IN_EXTRA_FIELD = 0xFFFFFFFF
_ZIP64_EXTRA = 0x0001
_IS_UTF8 = 0x0800
_HAS_DESCRIPTOR = 0x0008
#: Flags of members that no reader of checkpoints can read: encrypted, a patch of another file, strongly encrypted, or
#: with a masked directory.
_IS_UNREADABLE = 0x0001 | 0x0020 | 0x0040 | 0x2000
_STORED, _DEFLATED = 0, 8

#: MS-DOS attribute of a folder. miniz checks it whatever system made the archive (mz_zip_reader_is_file_a_directory).
_FOLDER_ATTRIBUTE = 0x10

#: Largest directory, which is read into memory. The directory of a million tensors has about 100 MB.
_MAX_DIRECTORY_BYTES = 1 << 28

#: Largest member that is read as a whole: the pickle of a checkpoint of a million tensors.
_MAX_MEMBER_BYTES = 1 << 28

#: torch.save's alignment of all payloads.
_ALIGNMENT = 64

_MAX_EXTRA_LENGTH = 0xFFFF

#: Sizes of a data descriptor: without and with signature, with lengths of 4 and of 8 bytes.
_DESCRIPTOR_BYTES = (12, 16, 20, 24)


class Member(NamedTuple):
    """One file of the archive.

    Attributes:
        name: path in the archive.
        raw_name: bytes of the name as stored.
        header_offset: offset of the local header in the file.
        stored_bytes: length in the archive.
        size_bytes: unpacked length.
        method: compression method.
        has_descriptor: whether a data descriptor, which repeats the lengths, follows the bytes.
        is_folder: whether torch's reader takes the member for a folder, and reads nothing.
        is_encrypted: whether restoring the bytes takes a key or another file.
    """

    name: str
    raw_name: bytes
    header_offset: int
    stored_bytes: int
    size_bytes: int
    method: int
    has_descriptor: bool
    is_folder: bool = False
    is_encrypted: bool = False

    @property
    def is_stored(self) -> bool:
        """Whether the bytes are stored uncompressed."""
        return self.method == _STORED

    @property
    def is_deflated(self) -> bool:
        """Whether the bytes are compressed by deflate."""
        return self.method == _DEFLATED


@dataclass(frozen=True, slots=True)
class Directory:
    """The central directory.

    Attributes:
        members: members in the order of the directory.
        offset: offset of the directory in the file.
        is_ambiguous: whether another reader could see other members. torch's reader (miniz) searches for the end record
            from the back, and accepts an archive comment that looks like one. Extra data in a zip64 end record may
            shift all offsets.
    """

    members: tuple[Member, ...]
    offset: int
    is_ambiguous: bool = False

    @property
    def root(self) -> str:
        """Folder of all of torch's members: that of the first member."""
        return self.members[0].name.partition("/")[0] if self.members else ""

    @property
    def raw_root(self) -> bytes:
        """Stored bytes of `root`: torch's reader compares bytes, not decoded text."""
        return self.members[0].raw_name.partition(b"/")[0] if self.members else b""

    @property
    def kind(self) -> ZipKind:
        """Kind of the archive, by the names of its members."""
        names = {member.name for member in self.members}
        if f"{self.root}/constants.pkl" in names or f"{self.root}/code/" in names:
            return "torchscript"
        if f"{self.root}/data.pkl" in names:
            return "torch_zip"
        if len(self.members) == 1 and not self.members[0].name.endswith("/"):
            return "single_member_zip"
        return "zip"


def read_directory(source: Source) -> Directory:
    """Read the central directory of an open file.

    Raises:
        BrokenFileError: the directory is missing at the end of the file, or does not fit the file.
    """
    offset, length, count, is_ambiguous = _find_directory(source)
    if length > _MAX_DIRECTORY_BYTES:
        raise BrokenFileError(f"zip archive with a directory of {length} bytes")
    listing = read_exactly(source, length, offset)
    members = tuple(_entries(listing, count))
    if len({member.name for member in members}) < count:
        raise BrokenFileError("zip archive that lists a name twice")
    return Directory(members, offset, is_ambiguous)


def payload_offsets(source: Source, directory: Directory) -> dict[str, int]:
    """Return the offset of each member's bytes in the file, by name. Reads every local header.

    Raises:
        BrokenFileError: a local header is not where the directory says, or two members overlap.
    """
    offsets = {}
    free_from = 0
    for member in sorted(directory.members, key=lambda member: member.header_offset):
        # detects holes that a crash or a broken parallel download left in the file
        begin = payload_offset(source, directory, member)
        if member.header_offset < free_from:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} overlaps what is next to it)")
        free_from = begin + member.stored_bytes
        offsets[member.name] = begin
    return offsets


def likely_offsets(directory: Directory) -> dict[str, int]:
    """Infer the offset of each member's bytes from the directory alone. Members without a unique answer are left out.

    torch.save leaves no gap between members, and aligns each payload to 64 bytes (PyTorchStreamWriter, in
    caffe2/serialize/inline_container.cc). If exactly one offset satisfies both, it is returned.

    Raises:
        BrokenFileError: two members overlap.
    """
    offsets = {}
    ends = ends_of(directory)
    for member in sorted(directory.members, key=lambda member: member.header_offset):
        end = ends[member.name]
        least = member.header_offset + _LOCAL.size + len(member.raw_name)
        if least + member.stored_bytes > end:
            raise BrokenFileError(f"damaged zip archive ({member.name!r} overlaps what is next to it)")
        descriptors = _DESCRIPTOR_BYTES if member.has_descriptor else (0,)
        begins = [end - bytes_after - member.stored_bytes for bytes_after in descriptors]
        fitting = [begin for begin in begins if begin % _ALIGNMENT == 0 and 0 <= begin - least <= _MAX_EXTRA_LENGTH]
        if len(fitting) == 1:
            offsets[member.name] = fitting[0]
    return offsets


def ends_of(directory: Directory) -> dict[str, int]:
    """Return the end of each member's space, by name: the offset of the next member, or of the directory."""
    members = sorted(directory.members, key=lambda member: member.header_offset)
    ends = [*(member.header_offset for member in members[1:]), directory.offset]
    return {member.name: end for member, end in zip(members, ends, strict=True)}


def payload_offset(source: Source, directory: Directory, member: Member) -> int:
    """Return the offset of one member's bytes, from its local header.

    Raises:
        BrokenFileError: the header is missing, or the bytes reach into the directory.
    """
    length = _LOCAL.size + len(member.raw_name)
    # an offset of 64 bits may be more than any file can have
    header = source.read(length, member.header_offset) if member.header_offset + length <= directory.offset else b""
    if header[:4] != LOCAL_SIGNATURE or header[_LOCAL.size :] != member.raw_name:
        raise BrokenFileError(f"damaged zip archive (no header of {member.name!r} at byte {member.header_offset})")
    *_, name_length, extra_length = _LOCAL.unpack_from(header)
    begin = member.header_offset + _LOCAL.size + name_length + extra_length
    if begin + member.stored_bytes > directory.offset:
        raise BrokenFileError(f"damaged zip archive ({member.name!r} overlaps what is next to it)")
    return int(begin)


def member_content(source: Source, directory: Directory, member: Member) -> bytes:
    """Return all unpacked bytes of a small member.

    Raises:
        BrokenFileError: the member is too large to be read as a whole, or cannot be unpacked.
    """
    if max(member.stored_bytes, member.size_bytes) > _MAX_MEMBER_BYTES:
        raise BrokenFileError(f"zip archive with {member.name!r} of {member.size_bytes} bytes")
    packed = read_exactly(source, member.stored_bytes, payload_offset(source, directory, member))
    content = packed if member.is_stored else _inflated(packed, member, member.size_bytes)
    if len(content) != member.size_bytes:
        raise BrokenFileError(f"damaged zip archive ({member.name!r} has another length than it declares)")
    return content


def member_head(source: Source, directory: Directory, member: Member, length: int) -> bytes:
    """Return the first unpacked bytes of a member; no bytes if its compression method is not supported.

    Raises:
        BrokenFileError: the member cannot be unpacked.
    """
    packed = source.read(min(length, member.stored_bytes), payload_offsets(source, directory)[member.name])
    return packed if member.is_stored else _inflated(packed, member, length)


def _inflated(packed: bytes, member: Member, length: int) -> bytes:
    if member.method != _DEFLATED:
        return b""
    try:
        # decompress() takes a limit of 0 for no limit
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, length) if length else b""
    except zlib.error as error:
        raise BrokenFileError(f"damaged zip archive ({member.name!r}: {error})") from None


def _find_directory(source: Source) -> tuple[int, int, int, bool]:
    """Return the central directory's offset, length and number of entries, and `Directory.is_ambiguous`."""
    end_offset, end = _find_end_record(source)
    is_ambiguous = END_SIGNATURE in end[1:]
    _, disk, directory_disk, _, count, length, offset, _ = _END.unpack_from(end)
    listing_end = end_offset
    locator_offset = end_offset - _LOCATOR64.size
    locator = source.read(_LOCATOR64.size, locator_offset) if locator_offset >= 0 else b""
    if locator.startswith(b"PK\x06\x07"):
        _, _, listing_end, _ = _LOCATOR64.unpack(locator)
        if not 0 <= listing_end <= locator_offset - _END64.size:
            raise BrokenFileError("damaged or truncated zip archive (its zip64 end record lies elsewhere)")
        record = _END64.unpack(read_exactly(source, _END64.size, listing_end))
        signature, rest_length, _, _, disk, directory_disk, _, count, length, offset = record
        is_ambiguous |= rest_length != _END64.size - 12
        if signature != b"PK\x06\x06" or listing_end + 12 + rest_length != locator_offset:
            raise BrokenFileError("damaged or truncated zip archive (its zip64 end record lies elsewhere)")
    if disk or directory_disk:
        raise BrokenFileError("one part of a zip archive that is split over several files")
    if offset + length != listing_end:
        what = "truncated zip archive" if offset + length > listing_end else "damaged or truncated zip archive"
        raise BrokenFileError(f"{what} (its directory should end at byte {offset + length}, not {listing_end})")
    return offset, length, count, is_ambiguous


def _find_end_record(source: Source) -> tuple[int, bytes]:
    """Return offset and bytes of the end record: the one that ends exactly at the end of the file, else the last one.

    torch's reader uses the last one, too, so bytes appended to the file, such as a line break, do no harm.
    """
    tail_length = min(source.size_bytes, _END.size + _MAX_COMMENT_LENGTH)
    tail = read_exactly(source, tail_length, source.size_bytes - tail_length)
    position = len(tail) - _END.size
    while (position := tail.rfind(END_SIGNATURE, 0, position + len(END_SIGNATURE))) >= 0:
        *_, comment_length = _END.unpack_from(tail, position)
        if position + _END.size + comment_length == len(tail):
            return source.size_bytes - tail_length + position, tail[position:]
        position -= 1
    position = tail.rfind(END_SIGNATURE, 0, len(tail) - _END.size + len(END_SIGNATURE))
    if position >= 0 and position + _END.size + _END.unpack_from(tail, position)[-1] < len(tail):
        return source.size_bytes - tail_length + position, tail[position:]
    raise BrokenFileError("truncated zip archive, or one with other data after its end (no directory there)")


def _entries(listing: bytes, count: int) -> Iterator[Member]:
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(listing):
            raise BrokenFileError("damaged zip archive (its directory is too short)")
        fields = _ENTRY.unpack_from(listing, position)
        signature, _, _, flags, method, _, _, _, stored, size, name_length, extra_length, comment_length = fields[:13]
        if signature != b"PK\x01\x02":
            raise BrokenFileError("damaged zip archive (its directory is garbled)")
        begin_extra = position + _ENTRY.size + name_length
        raw_name = listing[position + _ENTRY.size : begin_extra]
        header_offset = fields[-1]
        is_folder = raw_name.endswith(b"/") or bool(fields[-2] & _FOLDER_ATTRIBUTE)
        if _IN_EXTRA_FIELD in (size, stored, header_offset):
            extra = listing[begin_extra : begin_extra + extra_length]
            size, stored, header_offset = _widen(extra, size, stored, header_offset)
        name = raw_name.decode("utf-8" if flags & _IS_UTF8 else "cp437", errors="replace")
        if method == _STORED and stored != size:
            raise BrokenFileError(f"damaged zip archive ({name!r} is not compressed, and has two lengths)")
        has_descriptor, is_encrypted = bool(flags & _HAS_DESCRIPTOR), bool(flags & _IS_UNREADABLE)
        yield Member(name, raw_name, header_offset, stored, size, method, has_descriptor, is_folder, is_encrypted)
        position = begin_extra + extra_length + comment_length
    if position != len(listing):
        raise BrokenFileError("damaged zip archive (its directory has another length than it declares)")


def _widen(extra: bytes, *narrow: int) -> Iterator[int]:
    """Yield the fields; take those that did not fit into 32 bits from the zip64 extra field, in this order."""
    position = 0
    wide = b""
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, position)
        if tag == _ZIP64_EXTRA:  # the first zip64 field counts, as in torch's reader (miniz)
            wide = extra[position + 4 : position + 4 + length]
            break
        position += 4 + length
    taken = 0
    for value in narrow:
        if value == _IN_EXTRA_FIELD and taken + 8 <= len(wide):
            (value,) = struct.unpack_from("<Q", wide, taken)
            taken += 8
        yield value
