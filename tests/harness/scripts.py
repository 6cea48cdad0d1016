"""Whole programs on a deadline: a Python script, any command, or the real torchrun.

Unlike ``ranks`` these start from nothing, so that import order, import time, hash seeds and what
torch reads at import are a user's. They are slower by the import of torch, 1 to 2 s a process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from harness.environments import clean_environment
from harness.spawner import Process, process_state, spawner

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        exitcode: As of ``subprocess``: negative is the signal that killed it.
        worker_streams: Of torchrun only: (stdout, stderr) by (restart, local rank).
    """

    exitcode: int
    stdout: str
    stderr: str
    seconds: float
    ended_at: float
    peak_rss_bytes: int
    worker_streams: Mapping[tuple[int, int], tuple[str, str]] = field(default_factory=dict)

    def check(self) -> ProgramResult:
        """Itself, if the program succeeded; else an error with what it wrote."""
        assert self.exitcode == 0, f"exit code {self.exitcode}\n{self.stdout}\n{self.stderr}\n{self.worker_streams}"
        return self


class ProgramTimedOut(AssertionError):
    """A program had not ended at the deadline. It and its children are dead now."""


class Program:
    """A running program. Use it in a ``with`` block: at its end the program is dead."""

    def __init__(
        self, argv: Sequence[PathLike], env: Mapping[str, str | None] | None, working_dir: PathLike | None
    ) -> None:
        self._directory = spawner().new_directory()
        self._argv = [os.fspath(word) for word in argv]
        environment: dict[str, str | None] = {**clean_environment(), "PYTHONFAULTHANDLER": "1", **(env or {})}
        self._process: Process = spawner().start_program(
            self._argv,
            environment={name: value for name, value in environment.items() if value is not None},
            directory=self._directory / "program",
            working_dir=working_dir,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._process.stdout

    @property
    def stderr(self) -> str:
        return self._process.stderr

    @property
    def children(self) -> list[int]:
        """Process ids of its descendants, parents first."""
        return descendants(self.pid)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        self._process.signal(signum)

    def wait(self, timeout_seconds: float = 60) -> ProgramResult:
        """Waits for its end.

        Raises:
            ProgramTimedOut: With what it wrote; of Python programs the stacks stand at the end of that.
        """
        if not self._process.wait(time.monotonic() + timeout_seconds):
            state = process_state(self.pid)
            self._abort()
            words = " ".join(self._argv)
            text = f"{words!r} (state {state}) did not end within {timeout_seconds:g} s"
            streams = f"stdout:\n{self.stdout[-4000:]}\nstderr:\n{self.stderr[-8000:]}\n{self._worker_streams()}"
            self.close()
            raise ProgramTimedOut(f"{text}\n{streams}")
        process = self._process
        assert process.exitcode is not None and process.ended_at is not None and process.peak_rss_bytes is not None
        return ProgramResult(
            exitcode=process.exitcode,
            stdout=process.stdout,
            stderr=process.stderr,
            seconds=process.ended_at - process.started_at,
            ended_at=process.ended_at,
            peak_rss_bytes=process.peak_rss_bytes,
            worker_streams=self._worker_streams(),
        )

    def close(self) -> None:
        """Kills it with all its children, whatever process groups they are in."""
        self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _abort(self) -> None:
        # faulthandler prints all stacks on SIGABRT. Children first: a parent might kill them.
        for pid in reversed(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        self._process.wait(time.monotonic() + 0.5)
        self._process.signal(signal.SIGABRT)
        self._process.wait(time.monotonic() + 2)

    def _worker_streams(self) -> dict[tuple[int, int], tuple[str, str]]:
        return {}


class Torchrun(Program):
    """One torchrun agent; what its workers write goes to files, as with ``--redirects=3``."""

    def __init__(
        self,
        options: Sequence[str],
        words: Sequence[PathLike],
        env: Mapping[str, str | None] | None,
    ) -> None:
        self._logs_dir = spawner().new_directory()
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        super().__init__([*launcher, "--redirects=3", f"--log-dir={self._logs_dir}", *words], env, None)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._logs_dir, ignore_errors=True)

    def _worker_streams(self) -> dict[tuple[int, int], tuple[str, str]]:
        # <log dir>/<run id>_<random>/attempt_<restart>/<local rank>/stdout.log
        folders = [path for path in self._logs_dir.glob("*/attempt_*/*") if path.name.isdigit()]
        return {
            (int(folder.parent.name.removeprefix("attempt_")), int(folder.name)): (
                _read(folder / "stdout.log"),
                _read(folder / "stderr.log"),
            )
            for folder in sorted(folders)
        }


class ProgramStarter(Protocol):
    """``start_program``, or what starts a program in the same way somewhere else."""

    def __call__(
        self,
        argv: Sequence[PathLike],
        *,
        env: Mapping[str, str | None] | None = None,
        working_dir: PathLike | None = None,
    ) -> Program: ...


def start_program(
    argv: Sequence[PathLike],
    *,
    env: Mapping[str, str | None] | None = None,
    working_dir: PathLike | None = None,
) -> Program:
    """Starts a command; ``env`` comes over the test's own environment, ``None`` removes a variable."""
    return Program(argv, env, working_dir)


def run_program(
    argv: Sequence[PathLike],
    timeout_seconds: float = 60,
    *,
    env: Mapping[str, str | None] | None = None,
    working_dir: PathLike | None = None,
) -> ProgramResult:
    """Runs a command to its end."""
    with start_program(argv, env=env, working_dir=working_dir) as program:
        return program.wait(timeout_seconds)


def start_script(code_or_path: str | Path, *words: PathLike, env: Mapping[str, str | None] | None = None) -> Program:
    """Starts Python code (a string) or a file of it (a Path) in an interpreter of its own."""
    return start_program([*_python(code_or_path), *words], env=env)


def run_script(
    code_or_path: str | Path,
    *words: PathLike,
    env: Mapping[str, str | None] | None = None,
    timeout_seconds: float = 60,
) -> ProgramResult:
    """Runs Python code (a string) or a file of it (a Path) in an interpreter of its own."""
    with start_script(code_or_path, *words, env=env) as program:
        return program.wait(timeout_seconds)


def start_torchrun(
    path: Path,
    nproc_per_node: int,
    *words: PathLike,
    options: Sequence[str] = ("--standalone",),
    env: Mapping[str, str | None] | None = None,
) -> Torchrun:
    """Starts one agent of ``python -m torch.distributed.run`` on the script at ``path``.

    Args:
        options: Of torchrun. Several nodes are several agents with ``--nnodes=2 --rdzv-backend=c10d
            --rdzv-endpoint=127.0.0.1:PORT`` and a port from ``ports.reserved_port``.
    """
    return Torchrun([f"--nproc-per-node={nproc_per_node}", *options], [path, *words], env)


def run_torchrun(
    path: Path,
    nproc_per_node: int,
    *words: PathLike,
    options: Sequence[str] = ("--standalone",),
    env: Mapping[str, str | None] | None = None,
    timeout_seconds: float = 120,
) -> ProgramResult:
    """Runs a job under the real torchrun to its end; see ``start_torchrun``."""
    with start_torchrun(path, nproc_per_node, *words, options=options, env=env) as job:
        return job.wait(timeout_seconds)


def _python(code_or_path: str | Path) -> list[PathLike]:
    return [sys.executable, code_or_path] if isinstance(code_or_path, Path) else [sys.executable, "-c", code_or_path]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def descendants(pid: int) -> list[int]:
    """Process ids of the children of ``pid``, their children and so on, parents first."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended since the listing
        parents.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:  # grows while it is walked
        found.extend(parents.get(parent, []))
    return found[1:]
