"""What a function under ``run_ranks`` may call: tell its test where it is, wait for it, weigh itself.

Marks and gates are files in the rank's folder and in its group's: visible from outside, and there
after a SIGKILL. No test needs a sleep to catch a rank at a certain point.
"""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

from harness.waiting import POLL_SECONDS

_directory: Path | None = None


def attach(directory: Path) -> None:
    """Remembers the folder of this rank. Called once, before the function runs."""
    global _directory  # noqa: PLW0603 - a process is one rank
    _directory = directory


def mark(name: str, value: Any = None) -> None:
    """Tells the test that this rank has come to ``name``; ``value`` goes along, pickled."""
    assert _directory is not None, "mark() works in a process that run_ranks started"
    write_atomically(_directory / f"mark-{name}", pickle.dumps(value))


def wait_for_gate(name: str, timeout_seconds: float = 60) -> None:
    """Waits until the test has opened the gate ``name`` for the whole group or for this rank."""
    assert _directory is not None, "wait_for_gate() works in a process that run_ranks started"
    deadline = time.monotonic() + timeout_seconds
    gates = (_directory / f"gate-{name}", _directory.parent / f"gate-{name}")
    while not any(gate.exists() for gate in gates):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the test did not open the gate {name!r} within {timeout_seconds:g} s")
        time.sleep(POLL_SECONDS)


def mark_and_wait(name: str, value: Any = None, timeout_seconds: float = 60) -> None:
    """Marks ``name``, then waits until the test opens the gate of that name."""
    mark(name, value)
    wait_for_gate(name, timeout_seconds)


def pss_bytes(pid: int | str = "self") -> int:
    """Proportional set size: a page that n processes map counts 1/n, so that sums over ranks are true."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss line")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes ``path`` so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)
