"""Identify this machine, and the process namespace on it."""

from __future__ import annotations

import os
from pathlib import Path


def kernel_id() -> str:
    """Return what only processes under the same running kernel have in common: they share its page cache."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def process_space_id() -> str | None:
    """Return what processes have in common that may open each other's files through /proc; None where there is none.

    The kernel, the namespaces of process ids and users, and the user (ptrace(2), "Ptrace access mode checking").
    """
    try:
        namespaces = [(Path("/proc/self/ns") / kind).stat().st_ino for kind in ("pid", "user")]
    except OSError:
        return None
    return "-".join(map(str, (kernel_id(), *namespaces, os.geteuid())))
