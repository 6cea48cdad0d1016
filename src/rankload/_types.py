"""Types that several packages share. This module imports neither torch nor any other module of rankload."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Scope = Literal["auto", "job", "node", "process", "exchange"]
Delivery = Literal["auto", "read", "broadcast", "gather"]
Verify = Literal["once", "always", "never"]
Provenance = Literal["cache", "adopted", "download", "local"]

#: A rank's activity within a call. ``done`` means that the rank has finished its own part and waits for the verdict.
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
    "running",
    "preparing",
    "done",
]
#: Phases in which a rank may be alive and move no bytes: no other rank reports it as stuck.
DECLARED_WAITS: frozenset[Phase] = frozenset({"waiting", "backoff", "running", "done"})

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Return whether a text is a whole SHA-256 digest: 64 hex digits in lower case."""
    return _SHA256.fullmatch(text) is not None


#: Network filesystems may round a file's modification time, or update it later than the file's bytes.
_TIME_SLACK_NS = 2_000_000_000


@dataclass(frozen=True)
class Progress:
    """A rank's progress, as it publishes it to the other ranks.

    Attributes:
        phase: the current activity.
        bytes_done: bytes processed in this phase.
        bytes_total: bytes to process in this phase; None if the origin gave no length.
        attempt: number of the current attempt, from 1.
        file: printable name of the file that is downloaded.
    """

    phase: Phase
    bytes_done: int = 0
    bytes_total: int | None = None
    attempt: int = 1
    file: str | None = None


#: Receive this rank's progress. Raises another rank's error, so that a download that nobody needs any more stops.
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Identity:
    """A process's place in its job.

    Attributes:
        rank: 0 <= rank < world_size.
        world_size: number of ranks in the job (or in the group, when one is given).
        local_rank: index among the ranks of this node; None if the launcher does not set one.
        local_world_size: number of ranks on this node; None if the launcher does not set one.
        node_rank: index of this node in the job; None if the launcher does not set one.
        host: host name.
        launcher: rule that found this identity: ``"group"``, ``"torchrun"``, ``"ompi"``, …, ``"single"``.
        job_size: number of ranks in the job, if ``world_size`` is the size of a group. Local ranks always count the
            ranks of the job.
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
        """Whether the call has all ranks of the job."""
        return self.job_size in (None, self.world_size)

    @property
    def is_on_one_node(self) -> bool:
        """Whether all ranks of the call are known to be on this node."""
        return self.local_world_size == (self.job_size or self.world_size)


@dataclass(frozen=True)
class FileIdentity:
    """Facts that distinguish a file from another file under the same name.

    Attributes:
        inode: inode number.
        size_bytes: length of the file.
        mtime_ns: modification time, in nanoseconds since the epoch.
    """

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity of the file that a stat result describes."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    def is_same(self, other: FileIdentity, *, is_exact: bool) -> bool:
        """Return whether both identities belong to one file that nobody has written to.

        Args:
            other: identity of the file at another time, or on another node.
            is_exact: both identities were taken on one local filesystem. Otherwise inodes may differ between nodes
                (some FUSE filesystems renumber files), and so may times, but hardly both.
        """
        if is_exact:
            return self == other
        is_near = abs(self.mtime_ns - other.mtime_ns) <= _TIME_SLACK_NS
        return self.size_bytes == other.size_bytes and (self.inode == other.inode or is_near)


@dataclass(frozen=True)
class FetchedFile:
    """A verified local file.

    Attributes:
        path: path on this node.
        size_bytes: length of the file.
        sha256: full digest, if one was computed or recorded; else None.
        source: how the file got here.
        is_published: rankload published the file and its parts, and replaces them only by rename. They may stay mapped.
        part_sizes: sizes in bytes of an index's parts, in the order of their names; the parts lie beside the index.
        parts_sha256: digest of the parts' digests, in the same order; None unless all of them are known.
        identity: identity of the verified file, as this rank sees it; None if the file has only just been opened.
        reason: how the file got to this node, and why in that way; for logs and reports.
    """

    path: Path
    size_bytes: int
    sha256: str | None
    source: Provenance
    is_published: bool = False
    part_sizes: tuple[int, ...] = ()
    parts_sha256: str | None = None
    identity: FileIdentity | None = None
    reason: str = ""
