"""A small cluster on one machine, made of Linux namespaces: head, hub and node1..nodeN.

Every host has its own network, mount, UTS, IPC and PID namespace: own hostname, loopback and process ids, own
/tmp, /dev/shm and scratch directory. Everything else of the machine's file system is common, at the same paths.

    mg0   10.77.0.0/24   management   head .1, hub .2, nodeI .(10+I)   (names: head, hub, nodeI)
    wan0  10.77.2.0/24   outside      hub .2, nodeI .(10+I)            (names: hub-wan, nodeI-wan)

There is no default route: nothing can leave the lab. All other hosts live inside head's PID namespace, so the death
of head's init ends every process of the lab, and the kernel then frees namespaces, links and mounts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.wait import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("ip", "nsenter", "setpriv", "tc", "tini", "unshare")

# tini reaps what the SLURM daemons leave behind; it prints nothing, so its child says when it runs.
INIT = ("tini", "--", "sh", "-c", "echo up; exec sleep infinity")
NEW_NAMESPACES = ("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")

SET_UP_HEAD = """
hostname head; ip link set lo up
mount -t sysfs sysfs /sys                     # the machine's own /sys shows the machine's interfaces
mount --bind "$RUN/hosts" /etc/hosts
mount -t tmpfs -o mode=755 run /run           # for sockets: a path below $RUN may exceed their 107 characters
for net in mg wan; do ip link add br-$net type bridge forward_delay 0; ip link set br-$net up; done
ip addr add 10.77.0.1/24 dev br-mg
"""

SET_UP_HOST = """
hostname "$HOST"; ip link set lo up
mount -t sysfs sysfs /sys
for queue in /sys/class/net/*0/queues/rx-0/rps_cpus; do echo 1 >"$queue"; done   # see _boot_host
mount -t tmpfs -o size=1g,mode=1777 scratch "$RUN/scratch"
mount -t tmpfs -o size=2g,mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 keep /mnt          # carries what lies under /tmp and must stay visible ...
i=0; for path in $KEEP; do i=$((i + 1)); mkdir /mnt/$i; mount --rbind "$path" /mnt/$i; done
mount -t tmpfs -o size=512m,mode=1777 tmp /tmp
i=0; for path in $KEEP; do i=$((i + 1)); mkdir -p "$path"; mount --move /mnt/$i "$path"; done
umount /mnt                                   # ... while /tmp becomes the node's own
"""


class Lab:
    """A cluster of `node_count` nodes; use it as a context manager.

    Attributes:
        run_dir: Belongs to this lab alone, so labs may run side by side.
        shared: A directory that all hosts and this process share.
        scratch: The same path on every host, with each host's own content.
    """

    def __init__(self, node_count: int = 4) -> None:
        self.run_dir = REPOSITORY / "tests" / "cluster" / ".run" / uuid.uuid4().hex[:8]
        self.shared = self.run_dir / "shared"
        self.scratch = self.run_dir / "scratch"
        self.nodes = [f"node{number}" for number in range(1, node_count + 1)]
        self.when_node_starts: list[Callable[[str], object]] = []
        self._inits: dict[str, _Init] = {}

    def __enter__(self) -> Lab:
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise RuntimeError(f"the lab needs {', '.join(missing)}: run tests/run.sh, which installs them")
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the lab; its files stay until `remove_files`."""
        if head := self._inits.pop("head", None):
            head.kill()
        for init in self._inits.values():
            init.reap()
        self._inits.clear()

    def remove_files(self) -> None:
        shutil.rmtree(self.run_dir)

    # --- commands ---------------------------------------------------------------------------------------------

    def start(self, host: str, *command: str | Path, **popen: Any) -> subprocess.Popen[str]:
        """Start `command` on `host`; when the returned process ends, so does the command."""
        # nsenter forks to enter the PID namespace, and its own death alone would leave the command running.
        tied = ("setpriv", "--pdeathsig", "TERM", *map(str, command))
        return subprocess.Popen([*self._inits[host].enter, *tied], text=True, **popen)

    def run(self, host: str, *command: str | Path, timeout: float = 30, **popen: Any) -> str:
        """Run `command` on `host` and return its stdout; a failure raises with its output."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with ended(self.start(host, *command, **{**streams, **popen})) as process:
            stdout, stderr = process.communicate(timeout=timeout)
        if process.returncode:
            raise AssertionError(f"{host}: {command} exited with {process.returncode}\n{stdout}{stderr}")
        return stdout

    # --- faults -----------------------------------------------------------------------------------------------

    def limit(self, host: str, interface: str, rate: str | None) -> None:
        """Shape what leaves `host` through `interface` to `rate` (tc's words: "50mbit"); None lifts the limit."""
        if rate is None:
            self.run(host, "tc", "qdisc", "del", "dev", interface, "root")
        else:
            shape = ("tbf", "rate", rate, "burst", "128kb", "latency", "50ms")
            self.run(host, "tc", "qdisc", "replace", "dev", interface, "root", *shape)

    def kill_node(self, node: str) -> None:
        """Cut a node's power: the links go first, so that no peer hears a closing connection."""
        for net in ("mg", "wan"):
            self.run("head", "ip", "link", "set", f"{node}-{net}", "down")
        self._inits.pop(node).kill()

    def start_node(self, node: str) -> None:
        """Boot a node, with empty scratch, /tmp and /dev/shm."""
        self._boot_host(node, 10 + int(node.removeprefix("node")), ("mg", "wan"))
        for callback in self.when_node_starts:
            callback(node)

    # --- measurements -----------------------------------------------------------------------------------------

    def received_bytes(self, host: str, interface: str = "wan0") -> int:
        """The bytes that reached `host` through `interface`, headers of all layers included."""
        counter = f"/sys/class/net/{interface}/statistics/rx_bytes"
        return int(self.run(host, "cat", counter))

    # --- booting ----------------------------------------------------------------------------------------------

    def _boot(self) -> None:
        self.shared.mkdir(parents=True)
        self.scratch.mkdir()
        addresses = ["127.0.0.1 localhost", "10.77.0.1 head", "10.77.0.2 hub", "10.77.2.2 hub-wan"]
        for number, node in enumerate(self.nodes, start=11):
            addresses += [f"10.77.0.{number} {node}", f"10.77.2.{number} {node}-wan"]
        (self.run_dir / "hosts").write_text("\n".join(addresses) + "\n")
        # Without pdeathsig a killed test run would leave the lab behind.
        self._inits["head"] = _Init(["setpriv", "--pdeathsig", "KILL", *NEW_NAMESPACES, *INIT])
        self._script("head", SET_UP_HEAD)
        self._boot_host("hub", 2, ("mg", "wan"))
        for node in self.nodes:
            self.start_node(node)

    def _boot_host(self, host: str, number: int, nets: tuple[str, ...]) -> None:
        head = self._inits["head"]
        init = self._inits[host] = _Init([*head.enter, *NEW_NAMESPACES, *INIT])
        for net in nets:
            subnet = {"mg": 0, "wan": 2}[net]
            self._script(
                "head",
                f"""
                ip link del {host}-{net} 2>/dev/null || true    # what a killed node left
                ip link add {host}-{net} type veth peer name {net}0 netns {init.pid_as_seen_by(head)}
                ip link set {host}-{net} master br-{net} up
                # One CPU for all packets of a link: a sender that changes CPU overtakes its own packets, and TCP
                # sends some of them again.
                echo 1 >/sys/class/net/{host}-{net}/queues/rx-0/rps_cpus
                """,
            )
            self._script(host, f"ip addr add 10.77.{subnet}.{number}/24 dev {net}0; ip link set {net}0 up")
        self._script(host, SET_UP_HOST)

    def _script(self, host: str, script: str) -> None:
        kept = {str(path) for path in (REPOSITORY, sys.prefix, sys.base_prefix) if str(path).startswith("/tmp/")}
        variables = {"HOST": host, "RUN": str(self.run_dir), "KEEP": " ".join(sorted(kept))}
        self.run(host, "sh", "-euc", script, env={**os.environ, **variables})


class _Init:
    """The first process of a host, and the way into the host's namespaces."""

    def __init__(self, command: list[str]) -> None:
        self._starter = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._starter.stdout is not None
        if not self._starter.stdout.readline():
            raise RuntimeError(f"no new namespaces here: {self._starter.communicate()[1].decode()}")
        self.pid = next(pid for pid in _descendants(self._starter.pid) if _command_name(pid) == "tini")
        self.enter = ["nsenter", "-t", str(self.pid), "-m", "-n", "-u", "-i", "-p", "--"]

    def pid_as_seen_by(self, outer: _Init) -> int:
        """This init's process id in the PID namespace of `outer`."""
        depth = len(_namespace_pids(outer.pid))
        return _namespace_pids(self.pid)[depth - 1]

    def kill(self) -> None:
        os.kill(self.pid, 9)
        self.reap()

    def reap(self) -> None:
        self._starter.communicate(timeout=10)
        wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), 10, lambda: "an init outlived SIGKILL")


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever happens, the process is gone and reaped afterwards."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from _descendants(int(child))


def _command_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _namespace_pids(pid: int) -> list[int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [int(number) for line in lines if line.startswith("NSpid:") for number in line.split()[1:]]
