"""Heartbeats: the status that a rank publishes during a long call, and how other ranks judge it."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from rankload._coordination.polling import look_interval_seconds, silence_limit_seconds
from rankload._coordination.store import RankStore
from rankload._settings import Settings
from rankload._types import DECLARED_WAITS, Identity, Phase, Progress
from rankload.errors import CoordinationError, ProgressTimeoutError, RankFailedError, RankloadError, RankLostError

#: Longest time between two looks of a rank at the others, except in large jobs.
_LOOK_SECONDS = 0.5

#: Least time between two looks, however short the deadlines are.
_MIN_TICK_SECONDS = 0.05

#: Least time between a rank's own no-progress deadline and the moment when other ranks judge it as stuck.
_MIN_MARGIN_SECONDS = 5.0

#: Phases that a warm call goes through in milliseconds: the next heartbeat publishes them, not their beginning.
_USUALLY_SHORT: frozenset[Phase] = frozenset({"looking", "loading"})


@dataclass(frozen=True)
class Status:
    """One heartbeat of a rank, as it is published.

    Attributes:
        host: host name of the rank.
        pid: process id of the rank.
        progress: phase, bytes and file that the rank works on.
        beat: number of the heartbeat. A rank whose number does not change is dead or frozen.
        effort: counter of work that ``progress`` does not show: page faults, blocks read, units of 50 ms of CPU time.
            It counts as progress only while loading.
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


class Heartbeat:
    """Thread that publishes this rank's status during a call, and looks at the other ranks meanwhile.

    The first heartbeat comes after half a second. A warm call is over by then and publishes none. A rank that is killed
    later is known to have made the call. By looking at the others, a rank in the middle of a download notices that the
    call has failed.

    Args:
        store: store to publish in.
        key: key of this rank's status.
        identity: identity of this rank.
        interval_seconds: time between two heartbeats.
        look_around: looks at the other ranks; raises if one is lost.
        on_error: called with the error that ended the thread.
    """

    def __init__(
        self,
        store: RankStore,
        key: str,
        identity: Identity,
        interval_seconds: float,
        look_around: Callable[[], None],
        on_error: Callable[[RankloadError], None],
    ) -> None:
        self._store, self._key, self._identity = store, key, identity
        self._interval_seconds, self._look_around, self._on_error = interval_seconds, look_around, on_error
        self._progress = Progress("looking")
        self._beats = 0
        self._publishing = threading.Lock()  # without the lock, an older status could overwrite a newer one
        self._thread = threading.Thread(target=self._run, name="rankload-heartbeat", daemon=True)
        self._stop_requested = threading.Event()
        self._ticked_at, self._longest_still_seconds = time.monotonic(), 0.0

    def start(self) -> None:
        """Start the thread."""
        self._ticked_at = time.monotonic()
        self._thread.start()

    def take_longest_still_seconds(self) -> float:
        """Return the longest time that this process stood still since the last call of this method, in seconds.

        A process that is stopped, or whose threads get no CPU time, publishes no heartbeat: the others may have judged
        it as lost.
        """
        longest = max(self._longest_still_seconds, time.monotonic() - self._ticked_at)
        self._longest_still_seconds, self._ticked_at = 0.0, time.monotonic()
        return longest

    def beat(self, progress: Progress) -> None:
        """Record the progress for the next heartbeat. Publish a new phase at once, unless it is usually short."""
        is_new_phase = progress.phase != self._progress.phase and progress.phase not in _USUALLY_SHORT
        self._progress = progress
        if is_new_phase:
            self._publish()

    def stop(self, patience_seconds: float = 2.0) -> None:
        """Stop the thread; the last status stays readable. A thread that waits for a dead store is left behind."""
        self._stop_requested.set()
        if self._thread.ident is not None:
            self._thread.join(patience_seconds)

    def _run(self) -> None:
        longest_seconds = look_interval_seconds(self._identity.world_size, _LOOK_SECONDS)
        tick_seconds = max(_MIN_TICK_SECONDS, min(self._interval_seconds, longest_seconds))
        published_at = -self._interval_seconds
        try:
            while not self._stop_requested.wait(tick_seconds):
                now = time.monotonic()
                self._longest_still_seconds = max(self._longest_still_seconds, now - self._ticked_at)
                self._ticked_at = now
                if now - published_at >= self._interval_seconds:
                    published_at = now
                    self._publish()
                self._look_around()
        except RankloadError as error:
            self._on_error(error)
        except Exception as error:  # otherwise the heartbeats would end silently, and this rank count as lost
            self._on_error(RankFailedError(f"{type(error).__name__}: {error}", cause_type=type(error).__name__))

    def _publish(self) -> None:
        with self._publishing:
            self._beats += 1
            status = Status(self._identity.host, os.getpid(), self._progress, self._beats, _effort())
            self._store.set(self._key, status.to_json())


class PeerMonitor:
    """Judges one other rank by its published status.

    Args:
        store: store in which the rank publishes.
        key: key of the rank's status.
        rank: rank to judge.
        settings: deadlines: how long the rank may be silent, or make no progress.
        has_come: returns whether a rank is known to have made the call, even if it has published nothing.
        process_of: returns a rank's process id and host, if the rank has joined the session.

    Attributes:
        rank: the judged rank.
        is_absent: whether the rank may not have made the call yet, as of the last look.
        status: last status read; None before the first one.
    """

    def __init__(
        self,
        store: RankStore,
        key: str,
        rank: int,
        settings: Settings,
        has_come: Callable[[int], bool],
        process_of: Callable[[int], tuple[int, str] | None],
    ) -> None:
        self.rank, self._store, self._key, self._settings = rank, store, key, settings
        self._has_come, self._process_of = has_come, process_of
        self.is_absent = True
        self.status: Status | None = None
        self._silent_seconds = self._still_seconds = 0.0

    def look(self, elapsed_seconds: float) -> None:
        """Read the rank's status and judge it.

        Args:
            elapsed_seconds: time since the last look, without time in which this process was stopped.

        Raises:
            RankLostError: the rank's heartbeat has stopped for longer than `silence_limit_seconds`.
            ProgressTimeoutError: the rank is alive but makes no progress, and has not reported its own deadline either.
        """
        text = self._store.peek(self._key)
        self.is_absent = text is None and self.is_absent and not self._has_come(self.rank)
        if text is None:
            self._judge_silence(elapsed_seconds)
            return
        status = Status.from_json(text)
        has_beaten = self.status is None or status.beat != self.status.beat
        has_moved = self.status is None or _position(status) != _position(self.status)
        is_excused = status.progress.phase in DECLARED_WAITS
        self._silent_seconds = 0.0 if has_beaten else self._silent_seconds + elapsed_seconds
        self._still_seconds = 0.0 if has_moved or is_excused else self._still_seconds + elapsed_seconds
        self.status = status
        if error := self._judge(status):
            raise error

    def describe(self) -> str:
        """Return the rank, its host and its progress, for a log line."""
        if self.status is None:
            return f"rank {self.rank} ({'has not made this call yet' if self.is_absent else 'no heartbeat yet'})"
        return f"rank {self.rank} on {self.status.host}: {describe(self.status.progress)}"

    def _judge_silence(self, elapsed_seconds: float) -> None:
        """Judge a rank that has published nothing: it may have been killed in the first moments of the call."""
        if self.is_absent:
            return
        self._silent_seconds += elapsed_seconds
        if self._silent_seconds >= silence_limit_seconds(self._settings):
            process = self._process_of(self.rank)
            who = f"rank {self.rank}" + ("" if process is None else " (pid {} on {})".format(*process))
            raise RankLostError(
                f"{who} made the call and has given no sign of life for {self._silent_seconds:.0f} s: it was killed or "
                "is frozen; see its node's log (out of memory, preemption)",
                lost_rank=self.rank,
                lost_host=None if process is None else process[1],
            )

    def _judge(self, status: Status) -> CoordinationError | None:
        who = f"rank {self.rank} (pid {status.pid} on {status.host})"
        doing = describe(status.progress)
        if self._silent_seconds >= silence_limit_seconds(self._settings):
            return RankLostError(
                f"{who} has given no sign of life for {self._silent_seconds:.0f} s while {doing}: it was killed or "
                "is frozen; see its node's log (out of memory, preemption)",
                lost_rank=self.rank,
                lost_host=status.host,
                phase=status.progress.phase,
            )
        if self._still_seconds >= _stillness_limit_seconds(self._settings):
            return ProgressTimeoutError(
                f"{who} has made no progress for {self._still_seconds:.0f} s while {doing}: a hung filesystem or "
                "network; raise timeout= if this is normal here",
                stuck_rank=self.rank,
                stuck_host=status.host,
                phase=status.progress.phase,
            )
        return None


class RollCall:
    """Checks that ranks publish a new heartbeat, other than the last one at construction.

    Args:
        store: store in which the ranks publish.
        keys: keys of the ranks' statuses.
    """

    def __init__(self, store: RankStore, keys: Iterable[str]) -> None:
        self._store = store
        self._before = {key: store.peek(key) for key in keys}

    def is_complete(self) -> bool:
        """Return whether every rank has published a new heartbeat."""
        self._before = {key: text for key, text in self._before.items() if self._store.peek(key) == text}
        return not self._before


def describe(progress: Progress) -> str:
    """Return e.g. ``downloading 3.1 of 12.0 GB (model.pth)``."""
    of_file = f" ({progress.file})" if progress.file else ""
    done, total = progress.bytes_done, progress.bytes_total
    unit, unit_bytes = ("GB", 1e9) if (total or done) >= 1e9 else ("MB", 1e6)
    if total:
        return f"{progress.phase} {done / unit_bytes:.1f} of {total / unit_bytes:.1f} {unit}{of_file}"
    doing = f"{progress.phase} {done / unit_bytes:.1f} {unit}" if done else progress.phase
    return doing + of_file


def _stillness_limit_seconds(settings: Settings) -> float:
    """Return the time without progress after which other ranks judge a rank as stuck.

    The rank's own deadline passes first, since its error says more. The margin gives the rank time to close its threads
    and files before it reports that error.
    """
    return settings.progress_seconds + max(0.25 * settings.progress_seconds, _MIN_MARGIN_SECONDS)


def _position(status: Status) -> tuple[object, ...]:
    effort = status.effort if status.progress.phase == "loading" else 0
    return (status.progress.phase, status.progress.bytes_done, status.progress.attempt, effort)


def _effort() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # 50 ms of CPU time count as work: the heartbeat thread itself uses far less between two heartbeats
    return usage.ru_majflt + usage.ru_inblock + int((usage.ru_utime + usage.ru_stime) / 0.05)
