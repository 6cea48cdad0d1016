"""Run a function once per domain, and once across jobs: a stamp file records its result for the next job."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankload._cache.access import is_trusted, make_own_directory, name_of, open_plain, write_own_json
from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_write_errors
from rankload._coordination.call_context import CallContext
from rankload._coordination.job import Turn
from rankload._fetch.cache_domain import find_domain
from rankload._types import Progress, Scope
from rankload._urls import OWN_DIRECTORY
from rankload.errors import ArgumentError

_logger = logging.getLogger("rankload")

#: A value travels through the store.
_MAX_VALUE_BYTES = 60 << 10

#: Age after which a job's stamp is removed. A job that runs on only asks once more.
_MAX_JOB_SECONDS = 7 * 24 * 3600.0

#: How far the clocks of a job's hosts may differ.
_CLOCK_SLACK_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """A function to run once.

    Attributes:
        function: returns what JSON can hold, or a Path. Called with a function that counts progress, if
            ``has_deadline``; else without arguments.
        key: name of the task and of its version.
        directory: where the stamp is kept. Ranks that share the directory share one run.
        scope: which ranks share one run.
        redo: run the function even if a stamp says that it was run. A turn: unless a stamp says that a rank of this
            job ran it in that turn or a later one.
        has_deadline: ``function`` must report progress.
    """

    function: Callable[..., Any]
    key: str
    directory: Path
    scope: Scope
    redo: bool | Turn
    has_deadline: bool


def run_once(task: Task, call: CallContext) -> Any:
    """Return the function's value: run by one rank of each domain, unless a stamp has it. Collective.

    Raises:
        ArgumentError: the value is no JSON and no Path.
        CacheError: the directory cannot be used.
        RankloadError: the error of the rank that ran the function.
    """
    make_directory(task.directory)
    domain = find_domain(call.channel, task.scope, task.directory)
    name = f"once/{domain.key}"
    if not domain.is_leader:
        return _decoded(call.channel.wait_for(name, from_rank=domain.leader))
    encoded = _lead(task, call)
    call.channel.post(name, encoded)
    return _decoded(encoded)


def _lead(task: Task, call: CallContext) -> dict[str, Any]:
    from rankload._cache.lease import hold_lease  # imports filelock, which a stamped task does not need

    stamp = _Stamp(task)
    before = stamp.read()

    def finished_run() -> _Run | None:
        found = stamp.read()
        if isinstance(task.redo, Turn):
            return found if found is not None and found.covers(task.redo) else None
        return None if task.redo and found == before else found

    def on_wait() -> bool:
        call.report(Progress("waiting"))
        return finished_run() is not None

    if (found := finished_run()) is not None:
        return found.value
    stamp.make_directories()
    # the holder renews its lease while the function runs, however long that takes
    with hold_lease(stamp.lease_path, call.settings, progress_mark=stamp.lease_mark, on_wait=on_wait):
        if (found := finished_run()) is not None:
            return found.value
        value = _encoded(_run(task, call), task)
        stamp.write(value)
    return value


def _run(task: Task, call: CallContext) -> Any:
    level = logging.DEBUG if isinstance(task.redo, Turn) else logging.INFO  # one for each file would be too many
    _logger.log(level, "running %r once for all ranks that share %s", task.key, task.directory)
    if not task.has_deadline:
        call.report(Progress("running"))
        return task.function()
    steps = 1

    def progress() -> None:
        nonlocal steps
        steps += 1
        call.report(Progress("preparing", attempt=steps))

    call.report(Progress("preparing"))
    return task.function(progress)


@dataclass(frozen=True)
class _Run:
    """A run that a stamp records.

    Attributes:
        run_id: distinguishes the run from others of the same task.
        value: its value, encoded.
        job, number: of the turn in which it ran (`Turn`); None and 0 if it belonged to no turn.
        ended_at: when it ended, in seconds since the epoch by the clock of its host.
    """

    run_id: str
    value: dict[str, Any]
    job: str | None
    number: int
    ended_at: float

    def covers(self, turn: Turn) -> bool:
        """Return whether a rank of the turn's job ran in the same turn or a later one."""
        is_of_this_job = self.job == turn.job and self.ended_at >= turn.launched_at - _CLOCK_SLACK_SECONDS
        return is_of_this_job and self.number >= turn.number


class _Stamp:
    """The file that says that a task was run, with its value."""

    def __init__(self, task: Task) -> None:
        own = task.directory / OWN_DIRECTORY
        self._key, self._turn = task.key, task.redo if isinstance(task.redo, Turn) else None
        self._directory = own / ("once" if self._turn is None else "jobs")
        self._path = self._directory / f"{hashlib.sha256(task.key.encode()).hexdigest()[:32]}.json"
        self.lease_path = self._path.with_suffix(".lease")

    def read(self) -> _Run | None:
        """Return the last run, if this user or root has stamped the task and the value's path still exists."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            with os.fdopen(open_plain(self._path), encoding="utf-8") as file:
                owner_uid = os.fstat(file.fileno()).st_uid
                if not is_trusted(owner_uid):
                    _logger.debug("%s belongs to %s, and does not count", self._path, name_of(owner_uid))
                    return None
                found = json.loads(file.read(2 * _MAX_VALUE_BYTES))
            encoded = found["value"]
            if found["key"] == self._key and encoded.keys() == {"kind", "value"}:
                is_gone = encoded["kind"] == "path" and not Path(encoded["value"]).exists()
                if is_gone:
                    return None
                return _Run(found["run_id"], encoded, found["job"], int(found["number"]), float(found["ended_at"]))
        return None

    def make_directories(self) -> None:
        """Make the directories of the stamp and its lease.

        Raises:
            CacheError: they cannot be made.
        """
        with wrap_write_errors(self._path):
            for directory in (self._directory.parent, self._directory):
                make_own_directory(directory)

    def write(self, encoded: dict[str, Any]) -> None:
        """Write the stamp atomically.

        Raises:
            CacheError: it cannot be written.
        """
        job, number = (self._turn.job, self._turn.number) if self._turn else (None, 0)
        run = _Run(secrets.token_hex(8), encoded, job, number, time.time())
        with wrap_write_errors(self._path):
            write_own_json(self._path, {"key": self._key, **asdict(run)})
        if self._turn is not None:
            self._remove_stamps_of_ended_jobs(run.ended_at)

    def _remove_stamps_of_ended_jobs(self, now: float) -> None:
        with suppress(OSError):
            for path in self._directory.glob("*.json"):
                with suppress(OSError):
                    if now - path.lstat().st_mtime > _MAX_JOB_SECONDS:
                        path.unlink()

    def lease_mark(self) -> object:
        """Return what changes while the lease's holder lives."""
        with suppress(OSError):
            return self.lease_path.lstat().st_mtime_ns
        return None


def _encoded(value: Any, task: Task) -> dict[str, Any]:
    if isinstance(value, Path):
        encoded = {"kind": "path", "value": os.fspath(value.absolute())}
    else:
        encoded = {"kind": "json", "value": value}
    try:
        text = json.dumps(encoded)
        is_the_same = json.loads(text) == encoded
    except (TypeError, ValueError, RecursionError):
        is_the_same, text = False, ""
    if not is_the_same or len(text) > _MAX_VALUE_BYTES:
        raise ArgumentError(
            f"{task.key!r}: the function returned a {type(value).__name__} that cannot be handed to the other ranks: "
            f"return a Path, or what JSON can hold, of at most {_MAX_VALUE_BYTES} bytes"
        )
    return encoded


def _decoded(encoded: dict[str, Any]) -> Any:
    return Path(encoded["value"]) if encoded["kind"] == "path" else encoded["value"]
