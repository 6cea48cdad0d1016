"""The owner of a partial file, read from its name, and whether that process is dead."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rankload._cache.layout import Entry
from rankload._urls import OF_A_PARTIAL_FILE

_NAME = re.compile(f"{OF_A_PARTIAL_FILE.pattern}$")


@dataclass(frozen=True)
class Owner:
    """The process that owns a partial file, on this host or another.

    Attributes:
        machine: identifies the pid namespace, boot and host of the process id.
        pid: process id; 0 after the owner has abandoned the file.
        started_at: start time of the process, in clock ticks since boot.
    """

    machine: str
    pid: int
    started_at: str

    @property
    def is_here(self) -> bool:
        """Whether this process can find out if the owner is alive."""
        return self.pid == 0 or self.machine == _machine(os.getpid())

    @property
    def is_dead(self) -> bool:
        """Whether the owner certainly writes no more."""
        return self.pid == 0 or (self.is_here and _started_at(self.pid) not in (self.started_at, None))


def owner_of(path: Path) -> Owner | None:
    """Return the owner from a partial file's name; None if the name is not a partial file's."""
    match = _NAME.search(path.name)
    return Owner(match[1], int(match[2]), match[3]) if match else None


def own_path(entry: Entry) -> Path:
    """Return a new name for a partial file of this process."""
    pid = os.getpid()
    return _path(entry, pid, _started_at(pid) or "1")


def abandoned_path(entry: Entry) -> Path:
    """Return a new name for a partial file without an owner, which the next download may resume."""
    return _path(entry, 0, "0")


def partials_of(entry: Entry) -> list[Path]:
    """List the partial files of an entry, of all owners."""
    return [path for path in siblings_of(entry) if owner_of(path)]


def siblings_of(entry: Entry) -> list[Path]:
    """List the files whose names begin like those of an entry's partial files."""
    try:
        siblings = list(entry.path.parent.iterdir())
    except OSError:
        return []
    stem = entry.partial_stem  # another entry's name may begin with it: model, and model.pth
    return [path for path in siblings if path.name.startswith(stem) and OF_A_PARTIAL_FILE.match(path.name, len(stem))]


def boot_id() -> str:
    """Return the id of this boot of the kernel. Within a boot, all processes see written bytes, synced or not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _path(entry: Entry, pid: int, started_at: str) -> Path:
    owner = f"{_machine(os.getpid())}-{pid}-{started_at}-{secrets.token_hex(4)}"
    return entry.path.parent / f"{entry.partial_stem}.{owner}.partial"


@functools.lru_cache(maxsize=1)
def _machine(pid: int) -> str:
    """Return a digest of host, boot and pid namespace, within which a process id is unique.

    ``pid`` only makes the cache compute the digest again after a fork.
    """
    parts = [os.uname().nodename, boot_id()]
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _started_at(pid: int) -> str | None:
    """Return the start time of a process, in clock ticks since boot (proc(5), field 22).

    Returns ``0`` if there is no such process. Returns None if the process exists but is not readable: another user's
    under ``hidepid``, or any process on a system without ``/proc``.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if _lives(pid) else "0"
    fields = text.rpartition(")")[2].split()
    return "0" if fields[0] in ("Z", "X") else fields[19]  # a zombie writes no more


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has so large a number; anybody may choose a file's name
        return False
    except OSError:
        return True
    return True
