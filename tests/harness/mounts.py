"""Mounts that nobody else sees and that cannot outlive the test process, however it ends.

The test process moves into a mount namespace of its own before it starts any other process. Its ranks and programs
inherit the namespace and see what it mounts; the kernel takes all of it down with the last of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# <sched.h>, <sys/mount.h>
_CLONE_NEWNS = 0x20000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
_MS_REC, _MS_SLAVE = 16384, 1 << 19
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_problem: str | None = "harness.mounts.isolate() has not been called"


def isolate() -> None:
    """Moves this process into a mount namespace of its own. Threads and processes that it starts later follow.

    Where that is not allowed nothing changes, and ``why_not`` tells why.
    """
    global _problem  # noqa: PLW0603 - a process is in one mount namespace
    try:
        _check(_libc.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
        # Slave, not private: what is mounted on the machine still comes in, and ours does not get out.
        mount("none", "/", "none", _MS_REC | _MS_SLAVE)
    except OSError as error:
        _problem = f"no mount namespace of our own, which needs root: {error}"
    else:
        _problem = None


def why_not() -> str | None:
    """Why this process cannot mount anything; ``None`` if it can. Meant for ``pytest.mark.skipif``."""
    return _problem


def mount(source: str, target: str | Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {kind} on {target}")


def unmount(target: str | Path) -> None:
    """Takes ``target`` out of the tree, also while files on it are open: those stay usable until they are closed."""
    if _libc.umount2(os.fsencode(target), 0) == -1 and ctypes.get_errno() == errno.EBUSY:
        _check(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"umount {target}")


@contextlib.contextmanager
def mounted(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> Iterator[Path]:
    """Mounts on ``target`` (made if it is missing) until the block ends."""
    assert _problem is None, _problem  # or it would be the machine that gets a mount
    target.mkdir(parents=True, exist_ok=True)
    mount(source, target, kind, flags, options)
    try:
        yield target
    finally:
        unmount(target)


def _check(result: int, what: str) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
