"""Types that several floors share. Nothing here imports torch, or anything else of rankload."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
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
