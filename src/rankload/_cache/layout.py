"""Paths in the cache directory: torch.hub's file names, and rankload's own files beside them.

::

    <directory>/<file name>                                the published file, as torch.hub names it
    <directory>/<file name>.<owner>-<nonce>.partial        a download in progress, or the rest of a dead one
    <directory>/<file name>.<owner>-<nonce>.partial.journal    which bytes of the partial file are valid
    <directory>/.rankload/<file name>.json                 the file's record
    <directory>/.rankload/<file name>.lease                the lease: who is downloading the file
    <directory>/.rankload/quarantine/<file name>           a rejected file, and the reason (.json)
    <directory>/.rankload/partly-renewed                   in an index's folder: its parts may be of two versions
    <directory>/.rankload/<key>/<file name>                another URL with the same file name (and its .rankload/)
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rankload._urls import OWN_DIRECTORY, Url, is_own_name
from rankload.errors import ArgumentError, CacheError

#: torch.hub's pattern for the hash prefix in a file name: torch/hub.py HASH_REGEX, first match. It also matches
#: ``model-00001-of-00002.pth`` and ``ckpt-20230101.pth``, so it binds only when check_hash asks for it.
_HASH_PREFIX = re.compile(r"-([a-f0-9]*)\.")


@dataclass(frozen=True)
class Entry:
    """The paths that belong to one cached file.

    Attributes:
        path: path of the file.
        root: the cache directory that the caller chose; None means the file's own directory.
    """

    path: Path
    root: Path | None = None

    @property
    def record_path(self) -> Path:
        """Path of the file's record."""
        return self.path.parent / OWN_DIRECTORY / f"{fitting(self.path.name, 200)}.json"

    @property
    def lease_path(self) -> Path:
        """Path of the lease between jobs."""
        return self.path.parent / OWN_DIRECTORY / f"{fitting(self.path.name, 200)}.lease"

    @property
    def quarantine_path(self) -> Path:
        """Path to which a rejected file of this entry is moved."""
        return self.record_path.parent / "quarantine" / fitting(self.path.name, 200)

    @property
    def directories(self) -> list[Path]:
        """Directories between the cache directory and the file, outermost first. rankload makes and checks them."""
        if self.root is None:
            return []
        names = self.path.parent.relative_to(self.root).parts
        return [self.root.joinpath(*names[: count + 1]) for count in range(len(names))]

    @property
    def is_separate(self) -> bool:
        """Whether the file is in one of rankload's own directories, which belongs to a single URL."""
        return OWN_DIRECTORY in (path.name for path in self.directories)

    @property
    def partial_stem(self) -> str:
        """Common beginning of the names of this entry's partial files."""
        return fitting(self.path.name, 120)

    def separate(self, url: Url) -> Entry:
        """Return the entry for a URL whose file name is taken by another URL's file."""
        root = self.root or self.path.parent
        return Entry(self.path.parent / OWN_DIRECTORY / url.key[:16] / self.path.name, root)


def checkpoints_directory(hub_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return torch.hub's directory for checkpoints: ``$TORCH_HOME/hub/checkpoints``.

    ``hub_dir`` is the directory that torch.hub.set_dir() was called with, if any. ``~`` is expanded.

    Raises:
        CacheError: this user has no home directory (a container with an unknown user id).
    """
    if hub_dir is None:
        cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        hub_dir = Path(os.environ.get("TORCH_HOME", os.path.join(cache_home, "torch")), "hub")  # noqa: PTH118 - as torch
    try:
        return Path(hub_dir).expanduser().absolute() / "checkpoints"
    except RuntimeError:
        raise CacheError(
            f"{hub_dir}: this user has no home directory (HOME is not set, and user {os.geteuid()} is unknown); pass "
            "model_dir=, or set TORCH_HOME"
        ) from None


def checked_file_name(name: str) -> str:
    """Return the caller's file name if it stays inside the directory.

    Raises:
        ArgumentError: the name is empty or absolute, contains ``..`` or what no path can have, or is one of rankload's
            own.
    """
    path = PurePosixPath(name)
    is_beside = path.name and not path.is_absolute() and ".." not in path.parts
    if not is_beside or not _is_possible(name) or any(map(is_own_name, path.parts)):
        raise ArgumentError(
            f"file_name={name!r}: expected a relative file name without '..' that is not one of rankload's own files"
        )
    return name


def _is_possible(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def hash_prefix_of(file_name: str) -> str | None:
    """Return the hash prefix that torch.hub reads from a file name; None if there is none or it is empty."""
    match = _HASH_PREFIX.search(file_name)
    return match.group(1) or None if match else None


def fitting(name: str, most_bytes: int) -> str:
    """Return a name, or its beginning and a digest if it is too long: names have at most 255 bytes with suffixes."""
    raw = os.fsencode(name)
    # shortened names have most_bytes, or up to 3 less for a cut character: no unchanged name can equal one
    if len(raw) < most_bytes - 3:
        return name
    return f"{raw[: most_bytes - 17].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"
