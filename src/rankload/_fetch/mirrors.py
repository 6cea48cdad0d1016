"""Fill and hash a partial file from the first mirror that serves the file."""

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

#: How often a download starts over because the file changed or ranges are invalid; the last times without ranges.
_MAX_RESTARTS = 4


@dataclass(frozen=True)
class Received:
    """A complete partial file.

    Attributes:
        url: URL that served the file, or at least the last part of it.
        version: version that this URL's origin described.
        size_bytes: size of the file.
        sha256: SHA-256 of the file in hex digits.
        is_mixed: whether bytes of another URL are in it.
    """

    url: Url
    version: Version
    size_bytes: int
    sha256: str
    is_mixed: bool = False


class Receiver:
    """Fills one partial file.

    Args:
        request: headers, expected digest, and limits.
        partial: partial file, empty or with adopted bytes.
        report: called with the progress.
        settings: deadlines and sizes.
        is_whole: whether to request the whole file at once, without ranges.
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
        #: URL key and version of the bytes that are written
        self._there = (content.url_key, content.version) if content else None
        self._is_mixed = False
        self._others_error: Exception | None = None
        #: how often failed responses gave which length for a version
        self._lengths: dict[tuple[str | None, ...], Counter[int | None]] = defaultdict(Counter)

    def receive(self, urls: tuple[Url, ...]) -> Received:
        """Fetch from the first URL that works. If one breaks off, the next continues if it has the same file.

        Raises:
            FetchError: no URL served the file; the last URL's error. Or a file is larger than ``max_bytes``.
            CacheError: the bytes cannot be written.
        """
        if self._there is not None and not self._has_digest:  # only the URL that sent the bytes can continue them
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
                restarts += not restart.pause_seconds  # a restart with a pause is already counted as a failure
                if restarts > _MAX_RESTARTS:
                    raise (restart.error or AssertionError("endless restarts")) from None
                _logger.info("%s: starting over: %s", origin.display_name, restart.error or "its ranges are unreliable")
                is_whole = is_whole or restart.is_whole or restarts >= _MAX_RESTARTS // 2
                known, self._there, self._is_mixed = None, None, False
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
        """Start over if this origin gave another length for the same version more often, as a truncating proxy does.

        With a digest the check is unnecessary.
        """
        assert state.version is not None
        told, lengths = state.version.size_bytes, self._lengths[_identity(key, state.version)]
        others = [size_bytes for size_bytes in lengths if lengths[size_bytes] > lengths[told]]
        if others and not (self._has_digest or state.version.claim):
            display_name = state.origin.display_name
            text = f"{display_name}: one response gave {told} bytes as the length of this version, another {others[0]}"
            raise Restart(TruncatedError(text, url=display_name, expected=others[0], got=told), is_whole=False)

    def _known_at(self, key: str) -> Version | None:
        """Return the version of the written bytes, as the next origin would describe it; None to start over."""
        was_mixed, self._is_mixed = self._is_mixed, False
        if self._there is None:
            self._partial.clear()
            return None
        there, version = self._there
        if there == key:
            self._is_mixed = was_mixed
            return version
        # Another origin has other validators for the same file. So a digest decides at the end: the caller's, or that
        # of the first origin, which all further bytes must match.
        if self._has_digest or version.claim:
            self._is_mixed = True
            if not self._has_digest:
                self._partial.mix()
            return Version(version.size_bytes, claim=version.claim)
        self._partial.clear()
        return None

    def _hasher(self) -> OrderedHasher:
        self._partial.take_writers_back()  # streams of an earlier attempt may have been left behind
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
        return Received(origin.url, state.version, size_bytes, sha256, self._is_mixed)

    def _checked_report(self, progress: Progress) -> None:
        try:
            self._report(replace(progress, file=self._file_name))
        except Exception as error:  # another rank's error, even if it is a FetchError: do not try the next mirror
            self._others_error = error
            raise


def _identity(key: str, version: Version) -> tuple[str | None, ...]:
    """Return a value that stays the same as long as the content does."""
    return key, version.etag, version.last_modified
