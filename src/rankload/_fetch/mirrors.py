"""From the first mirror that gives it to a complete partial file, hashed."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.origin import Origin, Version
from rankload._fetch.origins.registry import origin_for
from rankload._fetch.partials.partial import Partial
from rankload._fetch.progress import Show, open_progress
from rankload._fetch.transfer.engine import TransferRunner
from rankload._fetch.transfer.failure_policy import Restart
from rankload._fetch.transfer.hasher import OrderedHasher
from rankload._fetch.transfer.retry import Retries, pause
from rankload._fetch.transfer.size_limit import SizeLimit, exceeds_limit
from rankload._fetch.transfer.state import TransferState
from rankload._settings import Settings
from rankload._text import printable
from rankload._types import Progress, Report
from rankload._urls import Url
from rankload.errors import FetchError, TruncatedError

_logger = logging.getLogger("rankload")

#: How often a download starts over because the file has changed or ranges make no sense; the last times without them.
_MAX_RESTARTS = 4


@dataclass(frozen=True)
class Received:
    """A complete partial file.

    Attributes:
        url: where it came from, the last part at least.
        version: what that origin said of it.
        size_bytes: its length.
        sha256: its digest.
    """

    url: Url
    version: Version
    size_bytes: int
    sha256: str


class Receiver:
    """Fills one partial file.

    Args:
        request: the headers, the expected digest.
        partial: new, or with bytes that were adopted.
        report, settings: as everywhere.
        is_whole: without ranges.
    """

    def __init__(
        self, request: FetchRequest, partial: Partial, report: Report, settings: Settings, *, is_whole: bool = False
    ) -> None:
        self._request, self._partial, self._report, self._settings = request, partial, report, settings
        self._is_whole = is_whole
        self._has_digest = bool(request.sha256 or request.hash_prefix)
        self._file_name = printable(Path(request.file_name).name)
        self._attempt = 0
        content = partial.content
        #: URL key and version of the bytes that are there
        self._there = (content.url_key, content.version) if content else None
        self._others_error: Exception | None = None
        #: how often which length was told of one version, by answers that came to nothing
        self._lengths: dict[tuple[str | None, ...], Counter[int | None]] = defaultdict(Counter)

    def receive(self, urls: tuple[Url, ...]) -> Received:
        """Fetch from the first URL that works; where one breaks off, go on at the next if it has the same file.

        Raises:
            FetchError: the last URL's; or the first's whose file is larger than ``max_bytes``.
            CacheError: the bytes cannot be written.
        """
        if self._there is not None and not self._has_digest:  # only where the bytes came from can they be gone on with
            came_from, _ = self._there
            urls = tuple(sorted(urls, key=lambda url: url.key != came_from))
        with open_progress(
            self._file_name,
            urls[0].display_name,
            self._partial.spans.total_bytes if self._there else 0,
            self._settings.report_seconds,
            is_wanted=self._request.progress,
        ) as show:
            for url in urls:
                with closing(origin_for(url, headers_of(self._request, url), self._settings)) as origin:
                    try:
                        return self._receive_from(origin, show)
                    except FetchError as error:
                        if url == urls[-1] or error is self._others_error or exceeds_limit(error):
                            raise
                        _logger.warning("%s; trying the next mirror", error)
        raise AssertionError("there is at least one URL")

    def _receive_from(self, origin: Origin, show: Show) -> Received:
        _logger.info('Downloading: "%s" to %s', origin.display_name, self._partial.path)
        key = self._partial.url_key = origin.url.key
        known, is_whole = self._known_at(key), self._is_whole
        retries, restarts = Retries(self._settings), 0
        while True:
            self._attempt += 1
            hasher = self._hasher()
            state = TransferState(
                origin, self._partial, hasher, known,
                is_whole=is_whole, has_digest=self._has_digest, retries=retries, settings=self._settings,
                size_limit=SizeLimit(self._request.max_bytes, self._request.downloaded_bytes),
            )  # fmt: skip
            try:
                hasher.start()
                TransferRunner(state, self._checked_report, show, self._attempt).run()
                self._check_length(key, state)
                return self._received(origin, state, hasher)
            except Restart as restart:
                restarts += not restart.pause_seconds  # what has a pause is counted as a failure already
                if restarts > _MAX_RESTARTS:
                    raise (restart.error or AssertionError("a restart without end")) from None
                _logger.info(
                    "%s: starting over: %s", origin.display_name, restart.error or "ranges cannot be relied on there"
                )
                is_whole = is_whole or restart.is_whole or restarts >= _MAX_RESTARTS // 2
                known = self._there = None
                if state.version is not None and state.version.size_bytes is not None:
                    self._lengths[_identity(key, state.version)][state.version.size_bytes] += 1
                hasher.abort()
                self._partial.clear()
                pause(restart.pause_seconds, self._checked_report, self._attempt)
            except FetchError:
                if state.is_whole:
                    self._there = None
                elif state.version is not None:
                    self._there = (key, state.version)
                raise
            finally:
                hasher.abort()

    def _check_length(self, key: str, state: TransferState) -> None:
        """Start over if this origin has told another length of the same version more often: so did a proxy that cut it.

        Where there is a digest, that tells.
        """
        assert state.version is not None
        told, lengths = state.version.size_bytes, self._lengths[_identity(key, state.version)]
        others = [size_bytes for size_bytes in lengths if lengths[size_bytes] > lengths[told]]
        if others and not (self._has_digest or state.version.claim):
            display_name = state.origin.display_name
            text = (
                f"{display_name}: it is {told} bytes long by one answer and {others[0]} by another, of the same version"
            )
            raise Restart(TruncatedError(text, url=display_name, expected=others[0], got=told), is_whole=False)

    def _known_at(self, key: str) -> Version | None:
        """Say of what version the bytes are that are there, in terms of the origin that is asked next."""
        if self._there is None:
            self._partial.clear()
            return None
        there, version = self._there
        if there == key:
            return version
        # Another origin has other validators for the same file. A digest tells at the end: the caller's, or the one
        # that an origin gave, which all further bytes are held to.
        if self._has_digest or version.claim:
            if not self._has_digest:
                self._partial.mix()
            return Version(version.size_bytes, claim=version.claim)
        self._partial.clear()
        return None

    def _hasher(self) -> OrderedHasher:
        self._partial.take_writers_back()  # streams of an earlier go may have been left behind
        hasher = OrderedHasher(self._partial.descriptor)
        for begin, end in self._partial.spans:
            hasher.adopt(begin, end)
        return hasher

    def _received(self, origin: Origin, state: TransferState, hasher: OrderedHasher) -> Received:
        assert state.version is not None
        size_bytes = hasher.done_bytes

        def on_bytes(done_bytes: int) -> None:
            self._checked_report(Progress("hashing", done_bytes, size_bytes, self._attempt))

        sha256 = hasher.finish(on_bytes, self._settings.progress_seconds)
        return Received(origin.url, state.version, size_bytes, sha256)

    def _checked_report(self, progress: Progress) -> None:
        try:
            self._report(replace(progress, file=self._file_name))
        except Exception as error:  # what another rank failed with: no fault of this origin's, whatever it is
            self._others_error = error
            raise


def _identity(key: str, version: Version) -> tuple[str | None, ...]:
    """Return what stays the same as long as the content does."""
    return key, version.etag, version.last_modified
