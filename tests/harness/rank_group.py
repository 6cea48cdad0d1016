"""The ranks of one job while they run."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import rank as rank_side
from harness.rank_results import RankError, RankFailed, RankResult, RanksTimedOut, indented, streams_text
from harness.spawner import Process, spawner, stack_dump
from harness.waiting import POLL_SECONDS, wait_until


class RankGroup:
    """The ranks of one job while they run. Use it in a ``with`` block: at its end all are dead."""

    def __init__(
        self,
        function: Callable[..., Any],
        environments: Sequence[Mapping[str, str]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        held: Sequence[int],
    ) -> None:
        self._directory = spawner().new_directory()
        self._function, self._args, self._kwargs = function, args, kwargs
        self._environments = environments
        self._resources = contextlib.ExitStack()
        self._processes: dict[int, Process] = {}
        try:
            for rank in range(len(environments)):
                if rank not in held:
                    self.release(rank)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank. All ranks must have been released."""
        return [self._processes[rank].pid for rank in range(len(self._environments))]

    def release(self, rank: int) -> None:
        """Starts a rank that was held back."""
        assert rank not in self._processes, f"rank {rank} runs already"
        self._processes[rank] = spawner().start_function(
            self._function,
            args=(rank, *self._args),
            kwargs=self._kwargs,
            environment=self._environments[rank],
            directory=self._rank_dir(rank),
        )

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        self._processes[rank].signal(signum)

    def stop(self, rank: int) -> None:
        """Freezes a rank, as a node that swaps or a debugger would. Returns when it stands still."""
        self.kill(rank, signal.SIGSTOP)
        status = Path(f"/proc/{self._processes[rank].pid}/stat")
        wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", 10, f"rank {rank} stops")

    def cont(self, rank: int) -> None:
        self.kill(rank, signal.SIGCONT)

    def is_alive(self, rank: int) -> bool:
        return rank in self._processes and self._processes[rank].is_alive

    def stdout(self, rank: int) -> str:
        """What the rank has written so far."""
        return self._processes[rank].stdout

    def stderr(self, rank: int) -> str:
        return self._processes[rank].stderr

    def open_gate(self, name: str, rank: int | None = None) -> None:
        """Lets a rank, or all, go on from ``rank.wait_for_gate(name)``."""
        directory = self._directory if rank is None else self._rank_dir(rank)
        directory.mkdir(exist_ok=True)
        (directory / f"gate-{name}").touch()

    def wait_for_mark(self, name: str, ranks: Sequence[int] | None = None, timeout_seconds: float = 30) -> list[Any]:
        """Waits until the ranks (default: all) have marked ``name``; returns the values they gave."""
        deadline = time.monotonic() + timeout_seconds
        values = []
        for rank in range(len(self._environments)) if ranks is None else ranks:
            path = self._rank_dir(rank) / f"mark-{name}"
            while not path.exists():
                # Alive is asked first: a mark made just before the death counts.
                if not self.is_alive(rank) and not path.exists():
                    raise RankFailed(f"no mark {name!r}: {self._describe(rank)}")
                if time.monotonic() > deadline:
                    raise RankFailed(f"no mark {name!r} within {timeout_seconds:g} s: {self._describe(rank)}")
                time.sleep(POLL_SECONDS)
            values.append(pickle.loads(path.read_bytes()))
        return values

    def wait_for_end(self, rank: int, timeout_seconds: float = 30) -> RankResult:
        """Waits for one rank."""
        if not self._processes[rank].wait(time.monotonic() + timeout_seconds):
            raise RankFailed(f"not ended within {timeout_seconds:g} s: {self._describe(rank)}")
        return self._result(rank)

    def pss_bytes(self) -> list[int]:
        """Proportional set size of every rank, all taken while all are alive."""
        return [rank_side.pss_bytes(pid) for pid in self.pids]

    def wait(self, timeout_seconds: float = 60) -> list[RankResult]:
        """Waits for all ranks, and returns how each ended.

        Raises:
            RanksTimedOut: Some had not ended in time. All are killed.
        """
        held = [rank for rank in range(len(self._environments)) if rank not in self._processes]
        assert not held, f"ranks {held} were held back and never released"
        deadline = time.monotonic() + timeout_seconds
        hung = [rank for rank, process in sorted(self._processes.items()) if not process.wait(deadline)]
        if hung:
            count = f"{len(hung)} of {len(self._processes)} ranks"
            descriptions = [self._describe(rank) for rank in sorted(self._processes)]
            self.close()
            raise RanksTimedOut(f"{count} did not end within {timeout_seconds:g} s\n\n" + "\n".join(descriptions), hung)
        return [self._result(rank) for rank in sorted(self._processes)]

    def close(self) -> None:
        """Kills what still runs and removes the group's files."""
        for process in self._processes.values():
            process.signal(signal.SIGKILL, group=True)  # all at once: else the survivors see each death
        for process in self._processes.values():
            process.kill()
        self._resources.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def keep(self, resource: contextlib.AbstractContextManager[Any]) -> Any:
        """Enters ``resource``; it is left when the group closes."""
        return self._resources.enter_context(resource)

    def _rank_dir(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}"

    def _result(self, rank: int) -> RankResult:
        process = self._processes[rank]
        assert process.exitcode is not None and process.ended_at is not None and process.peak_rss_bytes is not None
        path = process.directory / "outcome.pickle"
        told = pickle.loads(path.read_bytes()) if path.exists() else {}
        marks = {
            mark.name.removeprefix("mark-"): pickle.loads(mark.read_bytes())
            for mark in process.directory.glob("mark-*")
        }
        return RankResult(
            rank=rank,
            pid=process.pid,
            exitcode=process.exitcode,
            exception=RankError(**told["exception"]) if "exception" in told else None,
            stdout=process.stdout,
            stderr=process.stderr,
            seconds=told.get("seconds", process.ended_at - process.started_at),
            started_at=process.started_at,
            ended_at=process.ended_at,
            peak_rss_bytes=process.peak_rss_bytes,
            marks=marks,
            pickled_value=told.get("value"),
        )

    def _describe(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"rank {rank} was held back and never released\n"
        if not process.is_alive:
            return self._result(rank).describe()
        has_outcome = (process.directory / "outcome.pickle").exists()
        state = "has returned but does not leave" if has_outcome else "hangs"
        stacks = indented(stack_dump(process))
        return f"rank {rank} (pid {process.pid}) {state}\n{stacks}{streams_text(process.stdout, process.stderr)}"
