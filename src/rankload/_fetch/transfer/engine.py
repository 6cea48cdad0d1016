"""One go at the missing bytes of a file: the leader's thread, which starts streams, watches over them and reports."""

from __future__ import annotations

import time
from collections.abc import Callable

from rankload._fetch.transfer import stream_limits
from rankload._fetch.transfer.scaling import Pace
from rankload._fetch.transfer.state import Work
from rankload._fetch.transfer.stream import Stream
from rankload._types import Phase, Progress, Report
from rankload.errors import FetchTimeoutError

#: How often the other ranks are told, the pace is judged, and deadlines are looked at.
_TICK_SECONDS = 0.1

#: How long streams are waited for that were told to end. One that is deep in a connection attempt is left behind: it
#: writes nothing any more.
_JOIN_SECONDS = 0.3


class Transfer:
    """Fetches what is missing.

    Args:
        work: what there is to do.
        report: gets the progress; what it raises ends the transfer.
        show: gets the bytes done and in all (None: unknown), for a progress bar.
        attempt: for the report.
    """

    def __init__(self, work: Work, report: Report, show: Callable[[int, int | None], None], attempt: int) -> None:
        self._work, self._report, self._show, self._attempt = work, report, show, attempt
        self._pace = Pace(stream_limits.limit_for(work.origin.url, work.settings.streams))
        self._streams: list[Stream] = []
        self._bytes_before, self._refusals = work.done_bytes, 0

    def run(self) -> None:
        """Run to the end. The thread never blocks on the network, so signals and other ranks' failures are heard.

        Raises:
            Restart: see there.
            FetchError: the origin does not give the bytes.
            CacheError: they cannot be written.
            RankloadError: whatever ``report`` raises.
        """
        work = self._work
        silence = _Silence(work)
        try:
            while not work.is_complete() and work.failure is None:
                is_waiting = self._is_waiting()
                silence.check(is_waiting)
                self._report(self._progress(is_waiting))
                self._adjust()
                self._show(work.done_bytes, work.version.size_bytes if work.version else None)
                with work.changed:
                    if not work.is_complete() and work.failure is None:
                        work.changed.wait(_TICK_SECONDS)
        finally:
            self._stop()
        if work.failure is not None:
            raise work.failure
        self._show(work.done_bytes, work.done_bytes)

    def _adjust(self) -> None:
        """Have as many streams as help."""
        work, now = self._work, time.monotonic()
        if work.refusals > self._refusals:
            self._refusals = work.refusals
            self._pace.back_off(now, work.active_streams + 1)
        received_bytes = work.done_bytes - self._bytes_before
        self._pace.observe(now, received_bytes, work.active_streams, work.hash_bytes_per_second)
        work.target_streams = self._pace.target
        self._streams = [stream for stream in self._streams if stream.is_alive()]
        while work.refusals == self._refusals and work.enter(stream := Stream(work)):
            self._streams.append(stream)
            try:
                stream.start()
            except RuntimeError:  # this user, or this container, may start no more threads
                work.leave(stream)
                if not work.active_streams:
                    raise
                break

    def _is_waiting(self) -> bool:
        waits = [stream.is_waiting for stream in self._streams if stream.is_alive()]
        return bool(waits) and all(waits)

    def _progress(self, is_waiting: bool) -> Progress:
        work = self._work
        phase: Phase = "backoff" if is_waiting else "connecting" if work.version is None else "downloading"
        return Progress(phase, work.done_bytes, work.version.size_bytes if work.version else None, self._attempt)

    def _stop(self) -> None:
        self._work.stop()
        streams = [stream for stream in self._streams if stream.is_alive()]  # one may not have been started
        for stream in streams:
            stream.break_off()
        deadline = time.monotonic() + _JOIN_SECONDS
        for stream in streams:
            stream.join(max(0.0, deadline - time.monotonic()))


class _Silence:
    """The deadline on no progress: no byte on any stream, pauses that were declared not counted."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._moved_at, self._bytes = time.monotonic(), work.done_bytes

    def check(self, is_waiting: bool) -> None:
        """Raise if it has passed."""
        now, limit = time.monotonic(), self._work.settings.progress_seconds
        if is_waiting or self._work.done_bytes != self._bytes:
            self._moved_at, self._bytes = now, self._work.done_bytes
        elif now - self._moved_at > limit:
            shown = self._work.origin.shown
            raise FetchTimeoutError(
                f"{shown}: not a byte came within the deadline of {limit:g} s; raise timeout= or pass a mirror",
                url=shown,
            )
