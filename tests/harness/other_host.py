"""A program on what looks like another host: its own name, boot and process ids, the same files and network.

    with other_host.start(FETCH, url, cache) as program:
        ...

There is one kernel, so the page cache stays common; what tells hosts apart in files and names is not.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

from harness import mounts
from harness.scripts import PathLike, Program, start_program
from harness.waiting import wait_until

#: A script that fetches its first argument into the directory of the second, with rankload's whole log on stderr.
FETCH = """
import logging, sys
import rankload
logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("rankload").setLevel(logging.DEBUG)
print(rankload.dist_fetch(sys.argv[1], sys.argv[2]))
"""

_BECOME = """
mount -t proc proc /proc
mount --bind "$BOOT_ID_FILE" /proc/sys/kernel/random/boot_id
hostname elsewhere
exec "$0" "$@"
"""


def why_not() -> str | None:
    """Why there can be none here; ``None`` if there can."""
    return mounts.why_not()


def start(code: str, *words: PathLike, directory: Path) -> OtherHost:
    """Starts Python code there.

    Args:
        directory: for a file of this module's.
    """
    boot_id = directory / f"boot-{uuid.uuid4()}"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    separate = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child"]
    command = [*separate, "sh", "-euc", _BECOME, sys.executable, "-c", code, *words]
    return OtherHost(start_program(command, env={"BOOT_ID_FILE": str(boot_id)}))


class OtherHost:
    """The program while it runs. Use it in a ``with`` block: at its end it is dead."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __enter__(self) -> OtherHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.close()

    def kill(self) -> None:
        """Takes the host away: everything there is dead when this returns."""
        inside = self.program.children
        self.program.kill()
        self.program.wait(10)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside), 10, "the host is gone")

    def stop(self) -> None:
        """Freezes what runs there."""
        for pid in self.program.children:
            os.kill(pid, signal.SIGSTOP)

    def cont(self) -> None:
        for pid in self.program.children:
            os.kill(pid, signal.SIGCONT)
