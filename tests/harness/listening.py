"""Which ports a process listens on, asked of the kernel: a probing connection would be a server's first client."""

from __future__ import annotations

import os
from pathlib import Path

from harness.scripts import Program
from harness.waiting import wait_until

_LISTEN = "0A"  # TCP_LISTEN of the kernel's include/net/tcp_states.h


def wait_until_listening(program: Program, port: int, timeout_seconds: float = 20) -> None:
    """Waits until ``program`` itself, not a child of it, listens on ``port``, in whatever network namespace it is."""

    def does_listen() -> bool:
        assert program.is_alive, f"ended before it listened on port {port}:\n{program.stdout}{program.stderr}"
        return port in listening_ports(program.pid)

    wait_until(does_listen, timeout_seconds, f"a listener on port {port}")


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which a process listens."""
    try:
        inodes = {os.readlink(link).removeprefix("socket:[").rstrip("]") for link in Path(f"/proc/{pid}/fd").iterdir()}
        lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()]
    except OSError:  # a descriptor was closed while they were listed, or the process has ended
        return set()
    sockets = [line.split() for line in lines]
    # local address, remote address, state, ..., inode at 9
    return {int(words[1].rpartition(":")[2], 16) for words in sockets if words[3] == _LISTEN and words[9] in inodes}
