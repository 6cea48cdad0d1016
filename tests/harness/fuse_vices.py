"""What can be wrong with a mount of ``harness.fuse``: how cluster filesystems differ from a local disk."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from harness.fuse_wire import Op


@dataclass(frozen=True)
class Vices:
    """All off by default: then each mount is a coherent view of the backing directory, as on one machine.

    Attributes:
        locks: ``"pass"``: flock and fcntl locks are the backing files', and exclude across mounts (NFSv4, Lustre
            ``-o flock``). ``"local"``: each mount has its own and they silently exclude nobody else (Lustre
            ``-o localflock``, NFS ``nolock``). The name of an errno: all locks fail with it (``"ENOLCK"``: NFS without
            lockd; ``"ENOSYS"``: Lustre without ``-o flock``). ``"hang"``: no lock call returns before a signal comes.
        attribute_seconds: How long size, times and mode of a file are believed without asking (NFS ``acregmin``).
            Asking for a name brings them, too, so that stat() of a name is only as old as ``entry_seconds`` allows.
        entry_seconds: The same for the names of files that exist (NFS ``lookupcache``).
        negative_seconds: The same for names that did not exist.
        lag_seconds: Names made through another mount stay unknown here for so long, to directory listings too. It is
            counted from the file's last change (ctime), and a name once seen stays known.
        quota_bytes: How many bytes the backing directory may hold, summed over its files as they are now.
        quota_errno: Of a write beyond. With ``"ENOSPC"`` statfs shows what is left; with ``"EDQUOT"`` it shows the
            disk's free space, as it does for users' and projects' quotas.
        quota_at: ``"write"``: the write takes what fits, the next one fails. ``"close"``: all writes succeed, fsync or
            close fails and what was too much is gone (NFS, whose server hears of the bytes only then).
        folds_names: Names that differ in case, in how accents are composed or in dots at their end are one, which stays
            as it was first written (FAT, NTFS, SMB, APFS, ext4 with casefold).
        has_links: Without, link() fails with EPERM.
        direct_io: No page cache: every read asks the filesystem, and shared mappings fail with ENODEV.
        keeps_pages: What was read stays in the page cache when a file is opened again, as NFS has it where the server's
            file has not changed; without, each open() asks anew.
        reads_log: A file to which a line is written for each read: the process that asks, and how many bytes.
        supports_fallocate: Without, fallocate() fails with EOPNOTSUPP, as on NFS before 4.2.
        stale_opens: So many open() calls fail with ESTALE before the first succeeds.
        stale_reads: The same for read(). Files opened while some are left have no page cache.
        stale_when_removed: A file that was removed or replaced through another mount fails with ESTALE (NFS; pages in
            the cache can still be read there, too). Without, it lives on until it is closed, as on a local disk.
        errors: Operation -> name of the errno with which it always fails, such as ``{"fsync": "EIO"}``. Operations
            are those of ``harness.fuse_wire.Op`` in small letters.
    """

    locks: str = "pass"
    attribute_seconds: float = 0
    entry_seconds: float = 0
    negative_seconds: float = 0
    lag_seconds: float = 0
    quota_bytes: int | None = None
    quota_errno: Literal["EDQUOT", "ENOSPC"] = "EDQUOT"
    quota_at: Literal["write", "close"] = "write"
    folds_names: bool = False
    has_links: bool = True
    direct_io: bool = False
    keeps_pages: bool = False
    reads_log: str | None = None
    supports_fallocate: bool = True
    stale_opens: int = 0
    stale_reads: int = 0
    stale_when_removed: bool = False
    errors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refusals()  # a misspelt name fails in the test, not in the filesystem's process
        if self.quota_errno not in ("EDQUOT", "ENOSPC") or self.quota_at not in ("write", "close"):
            raise ValueError(f"no such quota: {self.quota_errno!r} at {self.quota_at!r}")

    def refusals(self) -> dict[int, int]:
        """Operation -> errno of those that always fail."""
        names = dict(self.errors)
        if not self.has_links:
            names["link"] = "EPERM"
        if not self.supports_fallocate:
            names["fallocate"] = "EOPNOTSUPP"
        if self.locks not in ("pass", "local", "hang"):
            names |= dict.fromkeys(("getlk", "setlk", "setlkw"), self.locks)
        return {Op[operation.upper()]: getattr(errno, name) for operation, name in names.items()}
