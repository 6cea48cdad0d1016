"""Types that several floors share. Nothing here imports torch, or anything else of rankload."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scope = Literal["auto", "job", "node", "process"]
Delivery = Literal["auto", "read", "broadcast", "gather"]
Verify = Literal["once", "always", "never"]
Provenance = Literal["cache", "adopted", "download", "local"]

#: A rank's activity within a call. ``waiting`` and ``backoff`` are declared waits: the rank lives, the bytes do not
#: move, and that is nobody's fault. ``done``: through with its own part, waiting for the verdict.
Phase = Literal[
    "looking",
    "waiting",
    "backoff",
    "connecting",
    "downloading",
    "hashing",
    "publishing",
    "sending",
    "receiving",
    "loading",
    "done",
]
DECLARED_WAITS: frozenset[Phase] = frozenset({"waiting", "backoff", "done"})


#: On network filesystems a file's time may be rounded, or come later than its bytes.
_TIME_SLACK_NS = 2_000_000_000


@dataclass(frozen=True)
class Progress:
    """What a rank is doing, as others see it. Sizes in bytes; ``bytes_total`` None where the origin gave no length.

    ``file`` is the name of the file that is downloaded, fit to be shown.
    """

    phase: Phase
    bytes_done: int = 0
    bytes_total: int | None = None
    attempt: int = 1
    file: str | None = None


#: Receives a rank's own progress. Raises what another rank failed with, so that a download nobody needs any more stops.
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Identity:
    """Who this process is in its job.

    Attributes:
        rank: 0 <= rank < world_size.
        world_size: number of ranks in the job (or in the group, when one is given).
        local_rank: index among the ranks of this node; None where the launcher does not tell.
        local_world_size: number of ranks on this node; None where the launcher does not tell.
        node_rank: index of this node in the job; None where the launcher does not tell.
        host: host name.
        launcher: which rule found it: ``"group"``, ``"torchrun"``, ``"ompi"``, …, ``"single"``.
        job_size: number of ranks in the job where ``world_size`` is a group's; local ranks are counted in the job.
    """

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    node_rank: int | None
    host: str
    launcher: str
    job_size: int | None = None

    @property
    def is_whole_job(self) -> bool:
        """Whether all ranks of the job take part."""
        return self.job_size in (None, self.world_size)

    @property
    def is_on_one_node(self) -> bool:
        """Whether all ranks that take part are known to be on this node."""
        return self.local_world_size == (self.job_size or self.world_size)


@dataclass(frozen=True)
class FetchRequest:
    """What to fetch, where to put it, and how to judge it. Made once from the call's arguments; no I/O.

    Attributes:
        urls: the URL and its mirrors, in order of preference; never empty.
        directory: the cache directory on this node, absolute, ``~`` expanded.
        file_name: the file's name in it, a relative path without ``..``.
        sha256: full expected digest, 64 lower-case hex digits; None when not known.
        sha256_source: who says so: ``sha256`` (the argument), ``sidecar``.
        hash_prefix: leading hex digits of the SHA-256 that the file name promises under ``check_hash``; None when
            not asked for.
        is_index: the caller asks for the index of a checkpoint in several files, by its name; it lies in a folder that
            is its URL's alone.
        is_part: an index that was fetched names it; it lies beside that.
        is_renewal: it replaces a file of such a checkpoint, whose others may have been replaced at the origin, too.
        must_be_checkpoint: refuse files that are no checkpoint (a web page, a tar of JPEGs).
        headers: extra request headers for the first URL's host; never logged, never recorded.
        verify: when to hash a cached file again.
        sidecar: the file ``<url>.sha256`` at the origin must vouch for it.
        scope: who shares one download.
        progress: show a progress bar on the downloading rank.
        offline: never open a socket.
        refresh: ask the origin whether a cached file is still its file.
        max_bytes: the most that the call may download; None for no limit.
        downloaded_bytes: what other files of the same call have taken of that.
    """

    urls: tuple[str, ...] = field(repr=False)  # signed queries have no place in a log
    directory: Path
    file_name: str
    sha256: str | None = None
    sha256_source: str = "sha256"
    hash_prefix: str | None = None
    must_be_checkpoint: bool = True
    is_index: bool = False
    is_part: bool = False
    is_renewal: bool = False
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    verify: Verify = "once"
    sidecar: bool = False
    scope: Scope = "auto"
    progress: bool = True
    offline: bool = False
    refresh: bool = False
    max_bytes: int | None = None
    downloaded_bytes: int = 0

    @property
    def digest(self) -> str | None:
        """What the SHA-256 must start with, as far as the caller has said."""
        return self.sha256 or self.hash_prefix


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from another one under the same name."""

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity of the file that a status is of."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    def is_same(self, other: FileIdentity, *, is_exact: bool) -> bool:
        """Return whether both are of one file that nobody has written to.

        Args:
            other: as seen at another time, or by another node.
            is_exact: both were seen on one local filesystem. Otherwise inodes may differ between nodes (some FUSE
                filesystems number files anew), and so may times, but hardly both.
        """
        if is_exact:
            return self == other
        is_near = abs(self.mtime_ns - other.mtime_ns) <= _TIME_SLACK_NS
        return self.size_bytes == other.size_bytes and (self.inode == other.inode or is_near)


@dataclass(frozen=True)
class FetchedFile:
    """A verified local file.

    Attributes:
        path: where it is on this node.
        size_bytes: its length.
        sha256: its full digest where one was computed or recorded, else None.
        source: how it came here.
        is_published: rankload has put it there, and its parts, and replaces them by rename alone: they may stay mapped.
        part_sizes: where it is the index of several files, theirs, in the order of their names; they lie beside it.
        parts_sha256: a digest of the digests of these, in the same order, where all are known.
        identity: of the file that was verified, as this rank sees it; None where it has only just been opened.
    """

    path: Path
    size_bytes: int
    sha256: str | None
    source: Provenance
    is_published: bool = False
    part_sizes: tuple[int, ...] = ()
    parts_sha256: str | None = None
    identity: FileIdentity | None = None
