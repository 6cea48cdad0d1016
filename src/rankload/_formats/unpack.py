"""Open local files, and unpack torch.hub's legacy zip: an archive of one checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from rankload._formats.broken import BrokenFileError
from rankload._formats.sniff import sniff
from rankload._formats.source import LocalSource, open_regular
from rankload._formats.unpack_limit import ALWAYS_ALLOWED_BYTES, MAX_RATIO, unpacked_limit
from rankload._formats.zipfile_limits import METHODS, ZIPFILE_ERRORS
from rankload._platform.scratch import descriptor_path, scratch_file
from rankload.errors import RankloadError

_CHUNK_BYTES = 1 << 20


def open_unpacked(path: Path, closing: ExitStack) -> LocalSource:
    """Open a file, or the only member of an archive of one file.

    Args:
        path: path of the file or archive.
        closing: closes the file, and removes unpacked bytes.

    Raises:
        BrokenFileError: the archive is damaged.
    """
    if sniff(path) == "single_member_zip":
        return LocalSource(closing.enter_context(unpacked(path)))
    return LocalSource(closing.enter_context(open_regular(path)).fileno())


@contextmanager
def unpacked(path: Path) -> Iterator[int]:
    """Unpack an archive of one member into a file without a name, so that the archive cannot choose a path.

    Yields:
        The descriptor of the unpacked file.

    Raises:
        BrokenFileError: the archive is damaged, or its member too large.
        CacheError: there is no room for the unpacked file.
    """
    with scratch_file(f"{path.name} unpacked", unpacked_size(path)) as content:
        unpack(path, content, lambda done: None)
        yield content.fileno()


def unpacked_size(path: Path) -> int:
    """Return the unpacked size in bytes that an archive of one member declares.

    Raises:
        BrokenFileError: the archive is damaged, or the member too large.
    """
    with _only_member(path) as (_, member):
        return member.file_size


def unpack(path: Path, target: IO[bytes], look: Callable[[int], None]) -> None:
    """Unpack an archive of one checkpoint.

    Args:
        path: path of the archive.
        target: file that gets the checkpoint; it is flushed, and must have a descriptor.
        look: called with the bytes written so far after each chunk; an error that it raises ends the work.

    Raises:
        BrokenFileError: the archive is damaged, holds no single checkpoint, or its member is too large.
    """
    with _only_member(path) as (archive, member):
        limit, done = _limit(path), 0
        with archive.open(member) as packed:
            while chunk := packed.read(_CHUNK_BYTES):
                done += len(chunk)
                if done > limit:  # the declared size may be wrong
                    raise _too_large(path, done)
                target.write(chunk)
                look(done)
        if done != member.file_size:
            raise BrokenFileError(f"archive of one file that has {done} bytes unpacked, but declares another size")
    target.flush()
    inside = sniff(descriptor_path(target.fileno()))
    if inside == "single_member_zip":
        raise BrokenFileError("a zip archive in a zip archive is no checkpoint")
    if inside == "sharded":  # the index has no parts beside it: their names would resolve to our own descriptors
        raise BrokenFileError("the index of a sharded checkpoint in a zip archive is no checkpoint")


@contextmanager
def _only_member(path: Path) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != 1:
                raise BrokenFileError(f"archive of one file that has {len(members)}")
            member = members[0]
            if member.file_size > _limit(path):
                raise _too_large(path, member.file_size)
            if member.compress_type not in METHODS:
                raise BrokenFileError("archive of one file that is not compressed by deflate")
            yield archive, member
    except (BrokenFileError, RankloadError):  # ours: some of them are RuntimeErrors or ValueErrors, too
        raise
    except ZIPFILE_ERRORS as error:
        raise BrokenFileError(f"archive of one file that cannot be unpacked ({error})") from error


def _limit(path: Path) -> int:
    return unpacked_limit(path.stat().st_size)


def _too_large(path: Path, size_bytes: int) -> BrokenFileError:
    packed_bytes = path.stat().st_size
    return BrokenFileError(
        f"archive of one file that would have {size_bytes} bytes unpacked, {size_bytes // max(packed_bytes, 1)} times "
        f"its own {packed_bytes}; rankload unpacks up to {MAX_RATIO} times, or {ALWAYS_ALLOWED_BYTES >> 20} MiB"
    )
