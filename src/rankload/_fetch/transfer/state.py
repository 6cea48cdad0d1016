"""The state that the streams of a transfer share: missing bytes, owners of ranges, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from rankload._fetch.origins.origin import Body, Origin, UnusableRange, Version
from rankload._fetch.transfer import stream_limits
from rankload._fetch.transfer.failure_policy import Failures, Restart
from rankload._fetch.transfer.first_request import ByteRange, FirstRequest
from rankload._fetch.transfer.hasher import OrderedHasher
from rankload._fetch.transfer.retry import Retries, is_temporary
from rankload._fetch.transfer.size_limit import SizeLimit
from rankload._fetch.transfer.target import Target
from rankload._platform.byte_ranges import ByteRanges
from rankload._settings import Settings
from rankload.errors import ContentChangedError, FetchError, FetchTimeoutError

#: Length of one request: about this time at the stream's own rate, so that a stream seldom waits for a distant origin;
#: but at most this many chunks, so that other streams seldom wait for a slow one.
_REQUEST_SECONDS = 1.0
_MAX_CHUNKS = 8


class TransferState:
    """State that the streams of a transfer share. Thread-safe.

    Args:
        origin: origin of the bytes.
        target: file to write to.
        hasher: hashes the bytes, and records which are written.
        known: version of the bytes that are already written; None if there are none.
        is_whole: whether to request the whole file at once, without ranges.
        has_digest: whether a digest will show at the end if ranges were of different versions.
        retries: counter of failures; may hold failures of an earlier attempt.
        settings: deadlines and sizes.
        size_limit: the caller's limit on the size of the whole file.

    Attributes:
        changed: notified about every change that the leader's thread should look at.
        version: version that the origin serves; None before the first response.
        is_whole: whether one response brings the whole file, without ranges.
        target_streams: number of streams to use.
        refusals: number of requests so far that the origin may have refused because of too many streams.
        failure: error that ended the transfer.
        is_stopped: whether streams must write nothing any more.
        is_excused: returns whether there is a good reason that no byte comes from elsewhere (see `leave_to_others`).
    """

    def __init__(
        self,
        origin: Origin,
        target: Target,
        hasher: OrderedHasher,
        known: Version | None,
        *,
        is_whole: bool,
        has_digest: bool,
        retries: Retries,
        settings: Settings,
        size_limit: SizeLimit | None = None,
    ) -> None:
        self.origin, self.target, self.settings = origin, target, settings
        self.size_limit = size_limit or SizeLimit()
        self.changed = threading.Condition()
        self.version: Version | None = None
        self.is_whole = is_whole
        self.target_streams = 1
        self.refusals = 0
        self.failure: Exception | None = None
        self.is_stopped = False
        self.is_excused: Callable[[], bool] = lambda: False
        self._hasher, self._known, self._has_digest = hasher, known, has_digest
        self._failures = Failures(retries, settings, hasher.done_bytes)
        self._taken = ByteRanges(hasher.covered)
        self._active: set[object] = set()
        self._first: FirstRequest | None = None
        self._has_ended = False
        self._bytes_before, self._brought_bytes = hasher.done_bytes, 0
        if known is not None and hasher.done_bytes == known.size_bytes:
            self.version = known  # nothing is missing

    @property
    def expected(self) -> Version | None:
        """Version of which ranges are requested; None if unknown."""
        return self.version or self._known

    @property
    def done_bytes(self) -> int:
        """Number of bytes that are written."""
        return self._hasher.done_bytes

    @property
    def fetched_bytes(self) -> int:
        """Number of bytes that the origin has sent."""
        return self.done_bytes - self._bytes_before - self._brought_bytes

    @property
    def hash_bytes_per_second(self) -> float:
        """Speed of the hash while it works."""
        return self._hasher.hash_bytes_per_second

    @property
    def active_streams(self) -> int:
        """Number of running streams."""
        return len(self._active)

    def is_complete(self) -> bool:
        """Return whether all bytes have come."""
        if self.version is None:
            return False
        return self._has_ended or (not self.is_whole and self._hasher.done_bytes == self.version.size_bytes)

    def leave_to_others(self, version: Version, ranges: Iterable[tuple[int, int]]) -> None:
        """Request no byte of some ranges: others bring them, and pass them to `bring`. Call this before the transfer.

        Args:
            version: version that all bring parts of.
            ranges: begin and end of each range, in bytes.

        Raises:
            CacheError: there is no room for the file.
        """
        assert version.size_bytes is not None
        is_long = version.size_bytes > self.settings.chunk_bytes
        self.target.make_room(version, is_resumable=is_long and self._may_be_split(version))
        with self.changed:
            self.version = version
            for begin, end in ranges:
                self._taken.add(begin, end)

    def bring(self, offset: int, piece: bytes | bytearray) -> None:
        """Record a piece of a range that was left to others: they have brought it, and it is written."""
        with self.changed:
            self._brought_bytes += len(piece)
            self.accept(offset, piece)
            self.changed.notify_all()

    def fetch_too(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Request ranges that were left to others, who will not bring them."""
        with self.changed:
            for begin, end in ranges:
                self._taken.remove(begin, end)

    def has(self, begin: int, end: int) -> bool:
        """Return whether a range is written."""
        return self._hasher.has(begin, end)

    def enter(self, stream: object) -> bool:
        """Let a stream begin; return False if there is nothing to do for it."""
        with self.changed:
            limit = 1 if self.is_whole or self.version is None else self.target_streams
            if len(self._active) < limit and self._wanted() is not None:
                self._active.add(stream)
                return True
            return False

    def leave(self, stream: object) -> None:
        """Record that a stream has ended."""
        with self.changed:
            self._active.discard(stream)
            self.changed.notify_all()

    def take(self, stream: object, bytes_per_second: float) -> ByteRange | None:
        """Give a stream its next range, of a length that suits its rate; None if the stream is not needed any more."""
        with self.changed:
            if self._first is not None and self._first.is_of(stream):
                self._first.withdraw_probe()
                self._first = None  # the first request has been answered in full
            missing = self._wanted()
            is_over = self.is_stopped or self.failure is not None
            if missing is None or is_over or stream not in self._active:  # an inactive stream was refused by the origin
                return None
            if len(self._active) > self.target_streams:
                self._active.discard(stream)
                return None
            begin, end = missing
            if self._first is not None:
                assert end is not None
                return self._first.send_probe(stream, begin, end)
            if self.is_whole:
                self._taken.add(0, 1)
                return ByteRange(0, None)
            if self.version is None and self.settings.whole_first and self.origin.may_answer_once:
                span = ByteRange(begin, end)
                self._first = FirstRequest(stream, span)
                self._taken.add(begin, begin + 1 if end is None else end)
                return span
            longest = begin + self._chunks(bytes_per_second) * self.settings.chunk_bytes
            end = longest if end is None else min(end, longest)
            self._taken.add(begin, end)
            return ByteRange(begin, end)

    def admit(self, body: Body, span: ByteRange) -> ByteRange:
        """Judge the head of a response; return the range that its body will fill.

        Args:
            body: body of the response.
            span: requested range. It is shortened if the file ends earlier, or if other streams share the range.

        Raises:
            Restart: the response, or the bytes so far, cannot be used.
            UnusableRange: the response may be of another version than the bytes so far, without a way to find out.
            FetchError: the file is larger than the caller allows.
            CacheError: there is no room for the file.
        """
        with self.changed:
            if self.is_stopped:
                raise Restart(None, is_whole=False)
            if body.is_whole and not self.is_whole and (span.end is not None or not self._may_be_split(body.version)):
                self.is_whole = True
                self._taken.add(0, 1)
            first = self.expected
            if first and not (body.is_whole or self._has_digest or body.version.can_be_told_from(first)):
                raise UnusableRange(
                    f"{self.origin.display_name}: the range may be of another version: no ETag or date to compare"
                )
            if self.version is None:
                self._check_total(body, span)
                self._learn(body)
            if self.is_whole:
                span.end = None
            else:
                self._bound(span)
            return ByteRange(body.begin, body.end)

    def claim(self, span: ByteRange, piece: bytes) -> tuple[int, bytes]:
        """Advance a span by a piece of its body; return where to write, and as much of the piece as is the stream's.

        The rest is another stream's meanwhile. No byte is written twice: what the other stream receives may differ, and
        the hash could be of these bytes, and the file have those.
        """
        with self.changed:
            begin = span.begin
            if span.end is not None:
                piece = piece[: span.end - begin]
            span.begin += len(piece)
            return begin, piece

    def accept(self, offset: int, piece: bytes | bytearray) -> None:
        """Record a piece that was written."""
        self._hasher.offer(offset, piece)

    def ended(self) -> None:
        """Record that the body of the whole file has ended."""
        with self.changed:
            self._has_ended = True
            self.changed.notify_all()

    def give_back(self, span: ByteRange) -> None:
        """Let another stream fetch the rest of a range."""
        with self.changed:
            if self._first is not None and span is not self._first.span:
                return  # the first stream fetches this part anyway
            if span.end is not None and not self.is_whole:
                self._taken.remove(span.begin, span.end)
            if self._first is not None and (probe := self._first.probe) is not None and probe.end is not None:
                self._taken.add(probe.begin, probe.end)
            self._first = None

    def pause_after(self, stream: object, error: FetchError, *, asked_at: float, has_moved: bool) -> float | None:
        """Decide how a stream continues after a failure.

        Args:
            stream: stream whose request failed.
            error: error of the request.
            asked_at: time at which the request was sent.
            has_moved: whether the request brought bytes before it failed.

        Returns:
            Seconds to wait before the next attempt; None if the stream should end, and leave its range to others.

        Raises:
            FetchError: ``error``; the transfer has failed.
            Restart: the bytes so far cannot be continued.
        """
        with self.changed:
            is_probe = self._first is not None and self._first.is_probed_by(stream)
            if is_probe and self._first is not None:
                self._first.withdraw_probe()
                self._first.may_probe = is_temporary(error)
            elif isinstance(error, ContentChangedError):
                raise Restart(error, is_whole=False)
            self._failures.hold(error)
            if is_probe or (not has_moved and len(self._active) > 1):  # perhaps too many streams for the origin
                self.refusals += 1
                self._active.discard(stream)
                if isinstance(error, FetchTimeoutError):  # the origin served the other streams, and let this one wait
                    stream_limits.lower_limit(self.origin.url.server, len(self._active))
                return None
            pause = self._failures.pause_after(error, self.done_bytes, asked_at=asked_at, is_resumed=not self.is_whole)
            if self.is_whole:
                raise Restart(error, is_whole=True, pause_seconds=pause)
            return pause

    def pause_after_unusable_range(self, stream: object, error: UnusableRange) -> float | None:
        """Decide as in `pause_after`, after an invalid response to a range request.

        Raises:
            FetchError, Restart: see `count_unusable_range`.
        """
        if self._first is not None and self._first.is_probed_by(stream):
            failure = FetchError(str(error), url=self.origin.display_name)
            return self.pause_after(stream, failure, asked_at=0.0, has_moved=False)
        self.count_unusable_range(error)
        return 0.0

    def count_unusable_range(self, error: UnusableRange) -> None:
        """Count an invalid response to a range request.

        Raises:
            FetchError: the request was for the whole file.
            Restart: the origin refuses all ranges; or this is the second such response with little progress in between.
        """
        with self.changed:
            if self.is_whole:
                raise FetchError(str(error), url=self.origin.display_name)
            if self._failures.count_unusable_range(self.done_bytes) > 1 or error.is_refusal:
                raise Restart(FetchError(str(error), url=self.origin.display_name), is_whole=True)

    def hold_seconds(self) -> float:
        """Return how long no request may be sent because the origin asked so, in seconds."""
        return self._failures.hold_seconds()

    def wait(self, seconds: float) -> None:
        """Let a stream's thread wait, at most until the transfer ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_stopped or self.failure is not None, seconds)

    def fail(self, error: Exception) -> None:
        """End the transfer with an error. Only the first error counts."""
        with self.changed:
            if self.failure is None and not self.is_stopped:
                self.failure = error
            self.changed.notify_all()

    def stop(self) -> None:
        """Let streams write nothing any more."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()

    def _learn(self, body: Body) -> None:
        version = body.version
        if version.size_bytes is None and self._known is not None and not body.is_whole:
            version = replace(version, size_bytes=self._known.size_bytes)  # Content-Range gave ``*`` as the size
        if version.size_bytes is not None:
            self.size_limit.check(self.origin.display_name, version.size_bytes, is_announced=True)
        if self._known is not None and self._known.claim and not version.claim and not body.is_whole:
            # the bytes so far, perhaps from another mirror, were claimed to have this digest: so must the new ones
            version = replace(version, claim=self._known.claim)
        may_be_split = self._may_be_split(version)
        if not body.is_whole and body.end != version.size_bytes and not may_be_split:
            raise Restart(None, is_whole=True)  # ranges of different versions could not be distinguished
        is_long = version.size_bytes is not None and version.size_bytes > self.settings.chunk_bytes
        self.target.make_room(version, is_resumable=may_be_split and is_long and not self.is_whole)
        self.version = version
        self.changed.notify_all()

    def _check_total(self, body: Body, span: ByteRange) -> None:
        """Restart without ranges if the first range ends at the file's end: some origins give a range's end as size."""
        is_bare_range = self._known is None and not body.is_whole and self.origin.may_answer_once
        if is_bare_range and body.version.size_bytes == span.end:
            raise Restart(None, is_whole=True)

    def _may_be_split(self, version: Version) -> bool:
        return version.size_bytes is not None and (version.has_validator or self._has_digest)

    def _bound(self, span: ByteRange) -> None:
        """Limit a range to the file's size; share the first range once the origin has answered the probe."""
        if self.version is not None and (size_bytes := self.version.size_bytes) is not None:
            span.end = size_bytes if span.end is None else min(span.end, size_bytes)
        if self._first is None:
            return
        if span is self._first.span and span.end is not None:
            self._taken.add(span.begin, span.end)
        elif span is self._first.probe:
            self._taken.remove(*self._first.share(span, self.settings.chunk_bytes))
            self._first = None
            self.changed.notify_all()

    def _wanted(self) -> tuple[int, int | None] | None:
        """Return a range that another stream may request; None if there is none."""
        if self._first is None or self.is_whole:
            return self._missing()
        return self._first.next_probe(self.settings.chunk_bytes, _MAX_CHUNKS, _REQUEST_SECONDS)

    def _missing(self) -> tuple[int, int | None] | None:
        size_bytes = self.expected.size_bytes if self.expected else None
        begin, end = self._taken.first_gap(size_bytes)
        if self.is_whole:
            return (0, None) if not self._taken.total_bytes else None
        return None if begin == end else (begin, end)

    def _chunks(self, bytes_per_second: float) -> int:
        chunk_bytes = self.settings.chunk_bytes
        size_bytes = (self.version and self.version.size_bytes) or 0
        by_rate = bytes_per_second * _REQUEST_SECONDS / chunk_bytes
        # use smaller requests towards the end, so that all streams end together
        by_rest = (size_bytes - self._taken.total_bytes) / (2 * self.target_streams * chunk_bytes)
        return max(1, min(_MAX_CHUNKS, int(by_rate), int(by_rest)))
