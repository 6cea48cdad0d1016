"""Identify this machine, and the process namespace on it."""

from __future__ import annotations

import os
from pathlib import Path


def kernel_id() -> str:
    """Return an id of the running kernel. Processes with the same id share one page cache."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def process_space_id() -> str | None:
    """Return an id that is equal for processes that may open each other's files through /proc; None without /proc.

    The id combines the kernel, the PID and user namespaces, and the user (ptrace(2), "Ptrace access mode checking").
    """
    try:
        namespaces = [(Path("/proc/self/ns") / kind).stat().st_ino for kind in ("pid", "user")]
    except OSError:
        return None
    return "-".join(map(str, (kernel_id(), *namespaces, os.geteuid())))
