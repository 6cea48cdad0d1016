"""Unpack a repository's archive."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path, PurePosixPath

from rankload._cache.access import NEW_FILE_MODE
from rankload._cache.files import wrap_write_errors
from rankload._formats.unpack_limit import unpacked_limit
from rankload._formats.zipfile_limits import METHODS, ZIPFILE_ERRORS
from rankload._text import printable
from rankload.errors import NotACheckpointError, RankloadError, VerificationError


def unpack_repository(archive: Path, target: Path, origin: str, mode: int) -> None:
    """Unpack what lies in the one top folder of a zip archive.

    Links and modes are not restored: a link becomes a file, as with torch.hub.

    Args:
        archive: path of the archive.
        target: directory to make.
        origin: printable name of the archive's origin.
        mode: mode of new directories, before the umask. Nobody else may write to the files, whatever the umask.

    Raises:
        VerificationError: the file is no zip archive with one top folder, a member would leave the folder, or the
            archive unpacks to far more than its size.
        CacheError: the files cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [(member, _path_of(member, origin)) for member in opened.infolist()]
            tops = {path.parts[0] for _, path in members}
            if len(tops) != 1:
                raise _refused(origin, f"it has {len(tops)} top folders instead of one")
            if sum(member.file_size for member, _ in members) > unpacked_limit(archive.stat().st_size):
                raise _refused(origin, "it unpacks to far more than its size")
            if any(member.compress_type not in METHODS for member, _ in members):
                raise _refused(origin, "it has members that are not compressed by deflate")
            for member, path in members:
                _unpack(opened, member, target.joinpath(*path.parts[1:]), mode)
    except RankloadError:
        raise
    except ZIPFILE_ERRORS as error:
        raise NotACheckpointError(
            f"{origin}: it answers with something that is no zip archive ({error})", origin=origin, got="no zip archive"
        ) from error


def _unpack(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, mode: int) -> None:
    with wrap_write_errors(path):
        if member.is_dir():
            _make_directories(path, mode)
            return
        _make_directories(path.parent, mode)
        with opened.open(member) as source, open(path, "xb", opener=_opened) as file:
            shutil.copyfileobj(source, file)  # the archive promises the size: read no more


def _make_directories(path: Path, mode: int) -> None:
    for directory in reversed((path, *path.parents)):
        if not directory.exists():
            directory.mkdir(mode)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags, NEW_FILE_MODE)


def _path_of(member: zipfile.ZipInfo, origin: str) -> PurePosixPath:
    name = member.filename
    path = PurePosixPath(name)
    has_drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or ".." in path.parts or "\\" in name or has_drive or not path.parts or "\0" in name:
        raise _refused(origin, f"its member {printable(name)!r} would be written outside of its folder")
    return path


def _refused(origin: str, why: str) -> VerificationError:
    return VerificationError(f"{origin}: the archive is refused: {why}", url=origin)
