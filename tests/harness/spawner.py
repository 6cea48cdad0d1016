"""The test process's side of the zygote: start processes, signal them, learn how they ended."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import zygote

_TESTS_DIR = Path(__file__).resolve().parent.parent
_START_SECONDS = 60  # importing torch on a loaded machine

#: Whether processes that run a function tear the interpreter down at their exit (the fixture ``whole_exit``).
tears_down = False


@dataclass(eq=False)
class Process:
    """A running or ended child of the zygote.

    Times are ``time.monotonic()``, comparable between processes.
    """

    pid: int
    directory: Path
    started_at: float
    exitcode: int | None = None
    ended_at: float | None = None
    peak_rss_bytes: int | None = None
    _spawner: Spawner = field(repr=False, kw_only=True)

    @property
    def is_alive(self) -> bool:
        self._spawner.take_events(0)
        return self.exitcode is None

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal; nothing happens to a process that has ended.

        Args:
            group: Also to the processes it started, as far as they stayed in its process group.
        """
        self._spawner.signal(self, number, group)

    def wait(self, deadline: float) -> bool:
        """Waits until it ended, or until ``time.monotonic()`` passes ``deadline``. True if it ended."""
        while self.exitcode is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._spawner.take_events(left)
        return True

    def kill(self) -> None:
        """Kills it with its process group, and waits until it is reaped."""
        self.signal(signal.SIGKILL, group=True)
        # A process in an uninterruptible call outlives SIGKILL for a moment, not for longer.
        if not self.wait(time.monotonic() + 20):
            raise RuntimeError(f"process {self.pid} survived SIGKILL for 20 s")

    def _read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""


class Spawner:
    """Starts processes through a zygote of its own. Not thread-safe: for the test's own thread."""

    def __init__(self) -> None:
        self.scratch_dir = Path(tempfile.mkdtemp(prefix="spawner-"))
        self.processes: dict[int, Process] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            **os.environ,
            "PYTHONPATH": str(_TESTS_DIR),
            # OpenBLAS starts its threads when it is imported, before any fork.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        code = f"from harness.zygote import start; start({theirs.fileno()}, {str(self.scratch_dir)!r})"
        with theirs, open(self.scratch_dir / "zygote.log", "wb") as log:
            self._zygote = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C reaches pytest alone, which then closes the socket
            )

    def start_function(
        self,
        function: Callable[..., Any],
        *,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        environment: Mapping[str, str],
        directory: Path,
    ) -> Process:
        """Forks a process that calls ``function(*args, **kwargs)``; torch is imported already."""
        module_path = sys.modules[function.__module__].__file__
        if "<locals>" in function.__qualname__ or module_path is None:
            raise TypeError(f"{function!r} must stand at the top of a module: another process imports it by name")
        job = {
            "argv": None,
            "module": function.__module__,
            "module_path": module_path,
            "qualname": function.__qualname__,
            "arguments": pickle.dumps((tuple(args), dict(kwargs))),
            "sys_path": list(sys.path),
            "environment": dict(environment),
            "working_dir": os.getcwd(),
            "tears_down": tears_down,
        }
        return self._start(job, directory, preload=True)

    def start_program(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        environment: Mapping[str, str],
        directory: Path,
        working_dir: str | os.PathLike[str] | None = None,
    ) -> Process:
        """Starts a program. It shares nothing with this process but its environment argument."""
        job = {
            "argv": [os.fspath(word) for word in argv],
            "environment": dict(environment),
            "working_dir": os.fspath(working_dir or os.getcwd()),
        }
        return self._start(job, directory, preload=False)

    def signal(self, process: Process, number: int, group: bool) -> None:
        if process.exitcode is None:
            self._send({"signal": int(number), "pid": process.pid, "group": group})

    def take_events(self, timeout_seconds: float) -> None:
        """Takes in what the zygote has to say; waits at most ``timeout_seconds`` for the first event."""
        while select.select([self._control], [], [], max(0.0, timeout_seconds))[0]:
            timeout_seconds = 0
            packet = self._control.recv(1 << 20)
            if not packet:
                log = (self.scratch_dir / "zygote.log").read_text(errors="replace")
                raise RuntimeError(f"the zygote (pid {self._zygote.pid}) is gone\n{log}")
            event = json.loads(packet)
            if "exited" in event:
                process = self.processes.pop(event["exited"])
                process.exitcode = event["exitcode"]
                process.ended_at = event["ended_at"]
                process.peak_rss_bytes = event["peak_rss_bytes"]
            elif "started" in event:
                # Registered here, not by the caller: its death may be the very next event.
                directory = Path(event["started"])
                process = Process(event["pid"], directory, time.monotonic(), _spawner=self)
                self.processes[process.pid] = process
                self._answers[event["started"]] = {"process": process}
            else:
                self._answers[event["failed"]] = event

    def new_directory(self) -> Path:
        """A folder that lives until the spawner closes, or until its user removes it."""
        return Path(tempfile.mkdtemp(dir=self.scratch_dir))

    def close(self) -> None:
        """Ends the zygote, and with it everything that it started."""
        self._control.close()
        try:
            self._zygote.wait(20)
        except subprocess.TimeoutExpired:
            self._zygote.kill()  # its children die with it: PR_SET_PDEATHSIG
            self._zygote.wait()
        shutil.rmtree(self.scratch_dir, ignore_errors=True)

    def _start(self, job: dict[str, Any], directory: Path, *, preload: bool) -> Process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "job.pickle").write_bytes(pickle.dumps(job))
        self._send({"start": str(directory), "preload": preload})
        deadline = time.monotonic() + _START_SECONDS
        while str(directory) not in self._answers:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the zygote did not start a process within {_START_SECONDS} s")
            self.take_events(deadline - time.monotonic())
        answer = self._answers.pop(str(directory))
        if "failed" in answer:
            raise RuntimeError(f"the zygote could not start a process:\n{answer['why']}")
        process: Process = answer["process"]
        return process

    def _send(self, request: dict[str, Any]) -> None:
        self._control.send(json.dumps(request).encode())


_spawner: Spawner | None = None


def spawner() -> Spawner:
    """The spawner of this test process, started when first asked for."""
    global _spawner  # noqa: PLW0603 - one zygote a test process
    if _spawner is None:
        _spawner = Spawner()
        atexit.register(_spawner.close)
    return _spawner


def running() -> set[Process]:
    """The processes that run now."""
    if _spawner is None:
        return set()
    _spawner.take_events(0)
    return set(_spawner.processes.values())


def stack_dump(process: Process, seconds: float = 2) -> str:
    """The Python stacks of all threads of a process that runs a function; what it does now, in words.

    Works while the process hangs in C code, too: faulthandler answers from the signal handler itself.
    """
    stacks = process.directory / "stacks"
    before = stacks.stat().st_size if stacks.exists() else 0
    state = process_state(process.pid)
    if state.startswith("T"):
        return "  (stopped by a signal: SIGSTOP or the like)"
    if not stacks.exists():
        return f"  (has no stack yet; state {state})"
    process.signal(zygote.STACK_DUMP_SIGNAL)
    deadline = time.monotonic() + seconds
    size = before
    while time.monotonic() < deadline and process.is_alive:
        time.sleep(0.02)
        if before < stacks.stat().st_size == size:
            break  # grown, and then the same twice: written to its end
        size = stacks.stat().st_size
    text = stacks.read_text(errors="replace")[before:]
    return text or f"  (did not answer within {seconds:g} s; state {state})"


def process_state(pid: int) -> str:
    """The kernel's word for what a process does, such as ``S (sleeping)``; empty when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next(line.split(None, 1)[1] for line in lines if line.startswith("State:"))
