"""Paths in the cache directory: torch.hub's file names, and rankload's own files beside them.

::

    <directory>/<file name>                                the published file, as torch.hub names it
    <directory>/<file name>.<owner>-<nonce>.partial        a download in progress, or what a dead one has left
    <directory>/<file name>.<owner>-<nonce>.partial.journal    which of its bytes are there
    <directory>/.rankload/<file name>.json                 its record
    <directory>/.rankload/<file name>.lease                who downloads it at the moment
    <directory>/.rankload/quarantine/<file name>           what was not what it should be, and why (.json)
    <directory>/.rankload/partly-renewed                   in an index' folder: its files may be of two versions
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
        path: of the file.
        root: the cache directory, which is the caller's choice; by default the file's own directory.
    """

    path: Path
    root: Path | None = None

    @property
    def record_path(self) -> Path:
        """The sidecar record."""
        return self.path.parent / OWN_DIRECTORY / f"{fitting(self.path.name, 200)}.json"

    @property
    def lease_path(self) -> Path:
        """The lease between jobs."""
        return self.path.parent / OWN_DIRECTORY / f"{fitting(self.path.name, 200)}.lease"

    @property
    def quarantine_path(self) -> Path:
        """Where a file of this entry goes that is not what it should be."""
        return self.record_path.parent / "quarantine" / fitting(self.path.name, 200)

    @property
    def directories(self) -> list[Path]:
        """The directories between the cache directory and the file, from the top: rankload makes and checks them."""
        if self.root is None:
            return []
        names = self.path.parent.relative_to(self.root).parts
        return [self.root.joinpath(*names[: count + 1]) for count in range(len(names))]

    @property
    def is_separate(self) -> bool:
        """Whether it is in a directory of rankload's own, which is one URL's alone."""
        return OWN_DIRECTORY in (path.name for path in self.directories)

    @property
    def partial_stem(self) -> str:
        """Start of the name of every partial file of this entry."""
        return fitting(self.path.name, 120)

    def separate(self, url: Url) -> Entry:
        """Return the entry for a URL whose file name is taken by a file that is not its own."""
        root = self.root or self.path.parent
        return Entry(self.path.parent / OWN_DIRECTORY / url.key[:16] / self.path.name, root)


def checkpoints_directory(hub_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return torch.hub's directory for checkpoints: ``$TORCH_HOME/hub/checkpoints``.

    ``hub_dir`` is what torch.hub.set_dir() was given, if it was. ``~`` is expanded.

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
            f"{hub_dir}: this user has no home directory (HOME is not set, and user {os.geteuid()} is unknown): pass "
            "model_dir=, or set TORCH_HOME"
        ) from None


def checked_file_name(name: str) -> str:
    """Return a user's file name if it stays inside the directory.

    Raises:
        ArgumentError: it is empty, absolute, climbs with ``..``, or is one of rankload's own.
    """
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or any(map(is_own_name, path.parts)):
        raise ArgumentError(
            f"file_name={name!r}: expected a relative file name without '..' that is not one of rankload's own files"
        )
    return name


def hash_prefix_of(file_name: str) -> str | None:
    """Return the hash prefix that torch.hub would read from a file name; None for none or an empty one."""
    match = _HASH_PREFIX.search(file_name)
    return match.group(1) or None if match else None


def fitting(name: str, most_bytes: int) -> str:
    """Return a name, or its beginning and a digest: a file name has at most 255 bytes, and more is to be added."""
    raw = os.fsencode(name)
    # what is cut has this length, or less by a part of a character: no name that is kept can be the same
    if len(raw) < most_bytes - 3:
        return name
    return f"{raw[: most_bytes - 17].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"
