"""Signs of life: what a rank publishes about itself during a long call, and how others judge it."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from rankload._errors import (
    ArrivalTimeoutError,
    CoordinationError,
    ProgressTimeoutError,
    RankLostError,
    StoreLostError,
)
from rankload._job.store import RankStore
from rankload._settings import Settings
from rankload._types import DECLARED_WAITS, Identity, Phase, Progress

#: Phases that a warm call goes through in milliseconds: they are published with the first beat that they outlast.
_USUALLY_SHORT: frozenset[Phase] = frozenset({"looking", "loading"})


@dataclass(frozen=True)
class Status:
    """One sign of life.

    Attributes:
        beat: counts the signs; a rank whose beat stands still is dead or frozen.
        effort: counts work that progress does not show (page faults, blocks read, CPU time while loading).
    """

    host: str
    pid: int
    progress: Progress
    beat: int = 0
    effort: int = 0

    def to_json(self) -> str:
        """Encode for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Status:
        """Decode from the store."""
        fields = json.loads(text)
        return cls(**{**fields, "progress": Progress(**fields["progress"])})


class Pulse:
    """Publishes this rank's status in the background while a call lasts.

    The thread starts with the first progress that is beaten, so a warm call has none. It also looks for the verdict of
    other ranks, so that a rank deep in a download learns that nobody needs it any more.
    """

    def __init__(
        self,
        store: RankStore,
        key: str,
        identity: Identity,
        interval_seconds: float,
        look_for_failure: Callable[[], None],
    ) -> None:
        self._store, self._key, self._identity = store, key, identity
        self._interval_seconds, self._look_for_failure = interval_seconds, look_for_failure
        self._progress: Progress | None = None
        self._beats = 0
        self._publishing = threading.Lock()  # or an older status could overwrite a newer one
        self._thread: threading.Thread | None = None
        self._stop_requested = threading.Event()

    def beat(self, progress: Progress) -> None:
        """Take note of the progress; publish a new phase at once, unless it is one that is usually over at once."""
        is_new_phase = self._progress is None or progress.phase != self._progress.phase
        is_new_phase = is_new_phase and progress.phase not in _USUALLY_SHORT
        self._progress = progress
        if is_new_phase:
            self._publish()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rankload-pulse", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; the last status stays readable."""
        self._stop_requested.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(StoreLostError):  # the rank's own next operation reports it
            while not self._stop_requested.wait(self._interval_seconds):
                self._publish()
                self._look_for_failure()

    def _publish(self) -> None:
        with self._publishing:
            self._beats += 1
            progress = self._progress or Progress("looking")
            status = Status(self._identity.host, os.getpid(), progress, self._beats, _effort())
            self._store.set(self._key, status.to_json())


class Watch:
    """Judges one other rank by what it publishes.

    Time counts only as far as this rank observes it: in a job that a scheduler suspends and resumes, everybody's beat
    is unchanged after an hour, and nobody is dead.
    """

    def __init__(self, store: RankStore, key: str, rank: int, settings: Settings) -> None:
        self.rank, self._store, self._key, self._settings = rank, store, key, settings
        self.status: Status | None = None
        self._observed_at = time.monotonic()
        self._absent_seconds = self._silent_seconds = self._still_seconds = 0.0

    def look(self) -> None:
        """Read the rank's status and judge it.

        Raises:
            ArrivalTimeoutError: it has shown no sign in this call for ``arrival_seconds``.
            RankLostError: its beat stands still for ``liveness_seconds``.
            ProgressTimeoutError: it beats but does not move for ``progress_seconds``.
        """
        text = self._store.peek(self._key)
        status = Status.from_json(text) if text else None
        elapsed = self._observed_seconds()
        if status is None:
            self._absent_seconds += elapsed
        else:
            has_beaten = self.status is None or status.beat != self.status.beat
            has_moved = self.status is None or _position(status) != _position(self.status)
            is_excused = status.progress.phase in DECLARED_WAITS
            self._silent_seconds = 0.0 if has_beaten else self._silent_seconds + elapsed
            self._still_seconds = 0.0 if has_moved or is_excused else self._still_seconds + elapsed
        self.status = status
        if error := self._judge():
            raise error

    def describe(self) -> str:
        """Name the rank, its host and what it does, for a log line."""
        if self.status is None:
            return f"rank {self.rank} (has not made this call yet)"
        return f"rank {self.rank} on {self.status.host}: {describe(self.status.progress)}"

    def _observed_seconds(self) -> float:
        now = time.monotonic()
        elapsed, self._observed_at = now - self._observed_at, now
        return min(elapsed, 2 * self._settings.heartbeat_seconds)

    def _judge(self) -> CoordinationError | None:
        limits = self._settings
        if self.status is None:
            if self._absent_seconds < limits.arrival_seconds:
                return None
            return ArrivalTimeoutError(
                f"rank {self.rank} did not make this call within {limits.arrival_seconds:g} s: every rank must make "
                "it, and in the same order",
                missing=str(self.rank),
            )
        who = f"rank {self.rank} (pid {self.status.pid} on {self.status.host})"
        doing = describe(self.status.progress)
        if self._silent_seconds >= limits.liveness_seconds:
            return RankLostError(
                f"{who} has given no sign of life for {limits.liveness_seconds:g} s while {doing}: it was killed or "
                "is frozen; see its node's log (out of memory, preemption)",
                lost_rank=self.rank,
                lost_host=self.status.host,
                phase=self.status.progress.phase,
            )
        if self._still_seconds >= 1.25 * limits.progress_seconds:  # its own deadline should have fired first
            return ProgressTimeoutError(
                f"{who} has made no progress for {self._still_seconds:.0f} s while {doing}: a hung filesystem or "
                "network; raise timeout= if this is normal here",
                stuck_rank=self.rank,
                stuck_host=self.status.host,
                phase=self.status.progress.phase,
            )
        return None


def describe(progress: Progress) -> str:
    """Return e.g. ``downloading 3.1 of 12.0 GB``."""
    if progress.bytes_total:
        gigabytes = f"{progress.bytes_done / 1e9:.1f} of {progress.bytes_total / 1e9:.1f} GB"
    elif progress.bytes_done:
        gigabytes = f"{progress.bytes_done / 1e9:.1f} GB"
    else:
        return progress.phase
    return f"{progress.phase} {gigabytes}"


def _position(status: Status) -> tuple[object, ...]:
    effort = status.effort if status.progress.phase == "loading" else 0
    return (status.progress.phase, status.progress.bytes_done, status.progress.attempt, effort)


def _effort() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # 50 ms of CPU time count as work: the pulse itself needs far less between two beats
    return usage.ru_majflt + usage.ru_inblock + int((usage.ru_utime + usage.ru_stime) / 0.05)
