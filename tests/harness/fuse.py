"""Mounts of one directory that behave like the mounts of a cluster filesystem on several nodes.

    with fuse.nodes(tmp_path, 2, locks="local", negative_seconds=2) as (first, second):
        ...  # ranks of one node use first.path, those of the other second.path

What can be wrong with them stands in ``fuse_vices.Vices``. The test process, its ranks and its programs see them,
nobody else does; see ``mounts``. Use ``pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))``.

Two things differ from a local disk even without vices. A lock that is dropped by close() alone, not by unlocking, is
free a moment later than close() returns. And a process that waits for a ``stalled`` mount may survive SIGKILL until
the stall ends, as under a hard NFS mount. O_TMPFILE, extended attributes and renameat2's flags are refused, as on NFS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import mounts
from harness.fuse_vices import Vices
from harness.scripts import Program, start_program
from harness.spawner import process_state
from harness.waiting import wait_until

_TESTS_DIR = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mount:
    """A mounted filesystem."""

    path: Path
    _program: Program = field(repr=False)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Until the block ends the server does not answer; who asks it waits. Caches still answer."""
        self._program.kill(signal.SIGSTOP)
        wait_until(lambda: process_state(self._program.pid).startswith("T"), 10, "the filesystem stands still")
        try:
            yield
        finally:
            self._program.kill(signal.SIGCONT)

    def kill(self) -> None:
        """Takes the server away for good: whoever waits, and every later call, gets ENOTCONN."""
        self._program.kill()
        self._program.wait(10)


def why_not() -> str | None:
    """Why there can be no such mount here; ``None`` if there can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse"
    return mounts.why_not()


@contextlib.contextmanager
def mounted(backing: Path, mountpoint: Path, **vices: Any) -> Iterator[Mount]:
    """Mounts ``backing`` on ``mountpoint`` until the block ends; makes both if they are missing.

    Args:
        vices: The fields of ``Vices``.

    Raises:
        AssertionError: At the end, when the filesystem itself had an error.
    """
    assert (problem := why_not()) is None, problem
    options = json.dumps(dataclasses.asdict(Vices(**vices)))
    backing.mkdir(parents=True, exist_ok=True)
    mountpoint.mkdir(parents=True, exist_ok=True)
    mountpoint = mountpoint.resolve()  # as the kernel lists it
    command = [sys.executable, "-S", "-m", "harness.fuse_filesystem", backing.resolve(), mountpoint, options]
    with start_program(command, env={"PYTHONPATH": str(_TESTS_DIR)}) as program:
        try:
            wait_until(lambda: program.stdout or not program.is_alive, 20, "the filesystem is mounted")
            assert program.stdout, f"the filesystem did not start:\n{program.stderr}"
            yield Mount(mountpoint, program)
        finally:
            program.kill(signal.SIGCONT)  # a stalled server would keep the kernel from handing over what is mapped
            if mountpoint in _mountpoints():
                mounts.unmount(mountpoint)
        if program.stderr:  # it may be in the middle of telling
            wait_until(lambda: not program.is_alive, 20, f"the filesystem that has failed ends:\n{program.stderr}")
        assert not program.stderr, f"the filesystem had an error:\n{program.stderr}"


@contextlib.contextmanager
def nodes(directory: Path, count: int = 2, **vices: Any) -> Iterator[list[Mount]]:
    """Mounts ``directory / "server"`` on ``directory / "node0"``, ``"node1"`` and so on; see ``mounted``."""
    with contextlib.ExitStack() as stack:
        paths = [directory / f"node{number}" for number in range(count)]
        yield [stack.enter_context(mounted(directory / "server", path, **vices)) for path in paths]


def _mountpoints() -> set[Path]:
    # Not os.path.ismount: it asks the filesystem, which may be stopped or dead.
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {Path(line.split()[1].encode().decode("unicode_escape")) for line in lines}
