"""Run a transfer on the leader's thread: start streams, watch them and report progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from rankload._fetch.transfer import stream_limits
from rankload._fetch.transfer.scaling import StreamScaler
from rankload._fetch.transfer.state import TransferState
from rankload._fetch.transfer.stream import Stream
from rankload._platform.clock import NoProgressTimer
from rankload._types import Phase, Progress, Report
from rankload.errors import FetchTimeoutError

#: How often the progress is reported, the number of streams is adjusted, and deadlines are checked.
_TICK_SECONDS = 0.1

#: Longest time that one tick may count. A longer one means that this process was stopped.
_MAX_TICK_SECONDS = 6.0

#: How long to wait for streams that were told to end. A stream in the middle of a connection attempt is left behind: it
#: can write nothing any more.
_JOIN_SECONDS = 0.3


class TransferRunner:
    """Fetches the missing bytes of a file with several streams.

    Args:
        state: state of the transfer.
        report: called with the progress. An error that it raises ends the transfer.
        show: called with the number of bytes done and in all (None: unknown), for a progress bar.
        attempt: number of the attempt, for the report.
    """

    def __init__(
        self, state: TransferState, report: Report, show: Callable[[int, int | None], None], attempt: int
    ) -> None:
        self._state, self._report, self._show, self._attempt = state, report, show, attempt
        self._scaler = StreamScaler(stream_limits.limit_for(state.origin.url.server, state.settings.streams))
        self._streams: list[Stream] = []
        self._bytes_before, self._refusals = state.done_bytes, 0

    def run(self) -> None:
        """Run to the end. This thread never blocks on the network, so it notices signals and other ranks' failures.

        Raises:
            Restart: the bytes so far cannot be continued; start over.
            FetchError: the origin does not serve the bytes.
            CacheError: the bytes cannot be written.
            RankloadError: any error of ``report``.
        """
        state = self._state
        no_progress = NoProgressTimer(state.done_bytes, _MAX_TICK_SECONDS)
        try:
            while not state.is_complete() and state.failure is None:
                phase: Phase = "connecting" if state.version is None else "downloading"
                if self._is_waiting():  # a declared pause
                    phase = "backoff"
                    no_progress.restart()
                elif no_progress.seconds_without_progress(state.done_bytes) > state.settings.progress_seconds:
                    if not state.is_excused():
                        raise self._timed_out()
                    phase = "waiting"
                    no_progress.restart()
                self._report(self._progress(phase))
                self._adjust()
                self._show(state.done_bytes, state.version.size_bytes if state.version else None)
                with state.changed:
                    if not state.is_complete() and state.failure is None:
                        state.changed.wait(_TICK_SECONDS)
        finally:
            self._stop()
        if state.failure is not None:
            raise state.failure
        self._show(state.done_bytes, state.done_bytes)

    def _adjust(self) -> None:
        """Adjust the number of streams to what the scaler has chosen."""
        state, now = self._state, time.monotonic()
        if state.refusals > self._refusals:
            self._refusals = state.refusals
            self._scaler.back_off(now, state.active_streams + 1)
        received_bytes = state.done_bytes - self._bytes_before
        self._scaler.observe(now, received_bytes, state.active_streams, state.hash_bytes_per_second)
        state.target_streams = self._scaler.target
        self._streams = [stream for stream in self._streams if stream.is_alive()]
        while state.refusals == self._refusals and state.enter(stream := Stream(state)):
            self._streams.append(stream)
            try:
                stream.start()
            except RuntimeError:  # the limit on threads of this user or container is reached
                state.leave(stream)
                if not state.active_streams:
                    raise
                break

    def _timed_out(self) -> FetchTimeoutError:
        display_name, limit = self._state.origin.display_name, self._state.settings.progress_seconds
        return FetchTimeoutError(
            f"{display_name}: not a byte came within the deadline of {limit:g} s; raise timeout= or pass a mirror",
            url=display_name,
        )

    def _is_waiting(self) -> bool:
        waits = [stream.is_waiting for stream in self._streams if stream.is_alive()]
        return bool(waits) and all(waits)

    def _progress(self, phase: Phase) -> Progress:
        state = self._state
        return Progress(phase, state.done_bytes, state.version.size_bytes if state.version else None, self._attempt)

    def _stop(self) -> None:
        self._state.stop()
        streams = [stream for stream in self._streams if stream.is_alive()]  # one may not have been started
        for stream in streams:
            stream.break_off()
        deadline = time.monotonic() + _JOIN_SECONDS
        for stream in streams:
            stream.join(max(0.0, deadline - time.monotonic()))
