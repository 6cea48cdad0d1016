"""The origin for http and https URLs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from typing_extensions import override
from urllib3.util import parse_url

from rankload._fetch.origins.advice import ANSWERED_BEFORE, advice_for
from rankload._fetch.origins.connections import BreakableSession, break_off
from rankload._fetch.origins.credentials import Credentials, Headers
from rankload._fetch.origins.http_body import HttpBody
from rankload._fetch.origins.http_errors import wrap_http_errors
from rankload._fetch.origins.http_headers import (
    claim_of,
    coding_of,
    content_length_of,
    content_range_of,
    location_of,
    retry_after_of,
    transfer_coding_of,
    version_of,
)
from rankload._fetch.origins.logs import without_queries
from rankload._fetch.origins.origin import Claim, NotModified, Origin, UnusableRange, Version
from rankload._fetch.origins.trust import Trust
from rankload._settings import Settings
from rankload._urls import (
    Server,
    Url,
    has_ambiguous_characters,
    redact,
    redact_text,
    server_of,
    user_of,
    why_refused,
    without_user,
)
from rankload._version import __version__
from rankload.errors import ContentChangedError, FetchError, FetchTimeoutError, HTTPStatusError

_MAX_REDIRECTS = 10

#: Longest validator to send back. Servers use 20 to 100 characters.
_MAX_VALIDATOR_CHARACTERS = 1024

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

#: Statuses whose body is the file, or a range of it. 202 is not among them: with it, servers that first pack an archive
#: say "come back later". A redirect without a target is not among them either.
_SUCCESSES = frozenset({200, 203, 206})

#: Statuses of an expired signed URL, depending on the service. S3 (for temporary credentials) and Google Cloud Storage
#: use 400: ExpiredToken.
_EXPIRED = frozenset({400, 401, 403, 404, 410})

#: Errors that have nothing to do with ranges: credentials, too many requests, files that are gone. 416 is handled
#: separately.
_NOT_ABOUT_RANGES = frozenset({401, 407, 408, 410, 416, 425, 429})


@dataclass(frozen=True)
class _Target:
    """The target of a URL's redirects.

    Attributes:
        url: URL to request directly from now on.
        claim: digest that a redirect gave on the way.
    """

    url: str
    claim: Claim | None = None


class HttpOrigin(Origin):
    """A file at an http or https URL. Thread-safe: each request has its own connection.

    Connections are kept alive for the next request of any thread: threads come and go as the number of streams changes.

    Proxies, certificates (`Trust`) and netrc come from the environment. Bodies come as stored
    (``Accept-Encoding: identity``), since digests are of the file's bytes.

    Args:
        url: URL of the file.
        headers: the caller's headers, for this URL's server only.
        settings: deadlines.
        environ: environment variables that may hold tokens.
    """

    def __init__(self, url: Url, headers: Headers, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        self.url, self.display_name, self.may_answer_once = url, url.display_name, True
        self._sessions: list[requests.Session] = []
        self._idle_sessions: list[requests.Session] = []
        self._first_url = without_user(url.raw)
        self._target = _Target(self._first_url)
        self._credentials = Credentials(url.raw, headers, environ, server=_server_as_asked(self._first_url))
        self._settings = settings
        self._refused_ranges = 0
        self._has_answered = self._has_served_ranges = self._is_sending_whole = False
        self._trust = Trust.from_environment()
        self._is_client_named = any(name.lower() == "user-agent" for name, _ in headers)

    @override
    def close(self) -> None:
        """Close all connections, and end requests that are still running in threads left behind."""
        for session in self._sessions:
            break_off(session)
            _close_connections(session)
            session.close()

    @override
    @contextlib.contextmanager
    def open(
        self, begin: int, end: int | None, version: Version | None, *, unless: Version | None = None
    ) -> Iterator[HttpBody]:
        """Request a range (see `Origin.open`).

        After the first redirects, requests go directly to their target, until the target refuses or fails.
        """
        with self._session() as session, contextlib.ExitStack() as stack:
            headers = {**_range_headers(begin, end, version), **_conditions(unless)}
            response = self._ask(stack, session, headers)
            refusal = response.status_code
            if end is not None and self._may_be_about_ranges(refusal):
                response = self._ask(stack, session, _conditions(unless))
                if version is not None and response.status_code in _SUCCESSES:
                    raise UnusableRange(
                        f"{self.display_name}: ranges are refused with status {refusal}", is_refusal=True
                    )
            if response.status_code == 304 and unless is not None:
                raise NotModified(self.display_name)
            if response.status_code == 416 and end is not None:
                if begin:
                    raise ContentChangedError(
                        f"{self.display_name}: the file ends before byte {begin} now", url=self.display_name
                    )
                response = self._ask(stack, session, {})  # no range of an empty file is satisfiable
            if response.status_code not in _SUCCESSES:
                raise self._status_error(response)
            body = self._body_of(response, begin, end, version)
            self._has_answered = True
            if end is not None:
                self._has_served_ranges = not body.is_whole
                yield body
                return
            self._is_sending_whole = True
            try:
                yield body
            finally:
                self._is_sending_whole = False

    def _may_be_about_ranges(self, code: int) -> bool:
        """Return whether to request the whole file because the origin refused a range.

        Some firewalls and gateways answer any range with an error, but serve the whole file. An error that is usually
        temporary must come three times: a whole file comes over only one connection, which is slower.
        """
        is_answered = self._has_served_ranges or self._is_sending_whole
        if code < 400 or code in _NOT_ABOUT_RANGES or is_answered:
            return False
        self._refused_ranges += 1
        return self._refused_ranges == (3 if code >= 500 and code not in (501, 505) else 1)

    def _ask(
        self, stack: contextlib.ExitStack, session: requests.Session, range_headers: dict[str, str]
    ) -> requests.Response:
        was_redirected = self._target.url != self._first_url
        try:
            response = self._follow(stack, session, range_headers)
        except FetchError:
            self._target = _Target(self._first_url)
            raise
        if was_redirected and response.status_code in _EXPIRED:
            self._target = _Target(self._first_url)
            response = self._follow(stack, session, range_headers)
        elif response.status_code not in _SUCCESSES:
            self._target = _Target(self._first_url)
        return response

    def _follow(
        self, stack: contextlib.ExitStack, session: requests.Session, range_headers: dict[str, str]
    ) -> requests.Response:
        """Send a request, follow redirects, and remember their target."""
        target = self._target
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._send(stack, session, target.url, range_headers)
            location = location_of(response.headers)
            if response.status_code not in _REDIRECTS or location is None:
                if response.status_code in _SUCCESSES:
                    self._target = target
                return response
            response.close()
            target = _Target(self._redirected(target.url, location), target.claim or claim_of(response.headers))
        raise FetchError(f"{self.display_name}: too many redirects", url=self.display_name)

    def _redirected(self, url: str, location: str) -> str:
        """Return the URL that a redirect leads to.

        Raises:
            FetchError: the target is not a plain http or https URL, or the redirect leads from https to http.
        """
        if has_ambiguous_characters(location):
            raise FetchError(f"{self.display_name}: it redirects to a malformed URL: refused", url=self.display_name)
        with wrap_http_errors(self.display_name):
            target = urljoin(url, location)
            server, before = server_of(target), server_of(url)
        if server is None or before is None:
            why = why_refused(target) or "it is not http or https"
            raise FetchError(
                f"{self.display_name}: it redirects to a URL that is refused: {why}", url=self.display_name
            )
        if user_of(target) is not None:
            raise FetchError(
                f"{self.display_name}: it redirects to a URL with a user name in it: refused", url=self.display_name
            )
        if (before.scheme, server.scheme) == ("https", "http"):
            raise FetchError(
                f"{self.display_name}: it redirects from https to {redact(target)}, which anyone on the network path "
                "could alter; use that URL itself if you trust it",
                url=self.display_name,
            )
        return target

    def _send(
        self, stack: contextlib.ExitStack, session: requests.Session, url: str, range_headers: dict[str, str]
    ) -> requests.Response:
        own = {"User-Agent": f"rankload/{__version__}", "Accept-Encoding": "identity", **range_headers}
        stall_seconds = min(self._settings.stall_seconds, self._settings.progress_seconds)
        deadlines = (self._settings.connect_seconds, stall_seconds)
        with wrap_http_errors(self.display_name), without_queries():
            request = session.prepare_request(requests.Request("GET", url, headers=own, auth=_as_given))
            server = self._server_that_is_asked(request)
            if server.scheme == "https":
                self._trust.check(self.display_name)
            request.headers.update(self._credentials.headers_for(server))
            environment = session.merge_environment_settings(request.url, {}, True, None, None)
            _check_proxy(select_proxy(request.url or "", environment["proxies"]))
            response = session.send(request, timeout=deadlines, allow_redirects=False, **environment)
        return stack.enter_context(response)

    def _server_that_is_asked(self, request: requests.PreparedRequest) -> Server:
        """Return the server that a request will be sent to, whose credentials the request may carry.

        The HTTP library itself parses the prepared URL to connect (with the standard library's parser since requests
        2.32, with urllib3's before). So both parsers must agree with `server_of` on that URL.

        Raises:
            FetchError: the parsers disagree.
        """
        url = request.url or ""
        server, found = server_of(url), parse_url(url)
        port = found.port or {"http": 80, "https": 443}.get(found.scheme or "")
        if server is None or server != (found.scheme, (found.host or "").strip("[]"), port):
            raise FetchError(f"{self.display_name}: its host can be read in two ways: refused", url=self.display_name)
        return server

    @contextlib.contextmanager
    def _session(self) -> Iterator[requests.Session]:
        """Lend the most recently used idle session, whose connection is most likely alive; else a new one."""
        try:
            session = self._idle_sessions.pop()
        except IndexError:
            session = BreakableSession(self._trust)
            self._sessions.append(session)
        try:
            yield session
        except FetchTimeoutError:
            self._close_idle_connections()
            raise
        finally:
            self._idle_sessions.append(session)

    def _close_idle_connections(self) -> None:
        """Close idle connections for the sake of waiting requests: some servers serve one connection at a time."""
        with contextlib.suppress(IndexError):  # none is left; other threads take idle sessions, too
            while True:
                _close_connections(self._idle_sessions.pop())

    def _body_of(self, response: requests.Response, begin: int, end: int | None, version: Version | None) -> HttpBody:
        if coding := coding_of(response.headers):
            raise FetchError(
                f"{self.display_name}: sent with Content-Encoding {coding}, although identity was requested: the bytes "
                "are not the file's, so they cannot be verified",
                url=self.display_name,
            )
        if (coding := transfer_coding_of(response.raw.headers.getlist("Transfer-Encoding"))) is not None:
            raise FetchError(
                f"{self.display_name}: sent with Transfer-Encoding {coding[:80]!r}, which was not requested",
                url=self.display_name,
            )
        is_whole = response.status_code != 206
        first, last, size_bytes = self._whole(response) if is_whole else self._checked_range(response, begin, end)
        found = version_of(response.headers, size_bytes, self._target.claim)
        if version is not None and (not version.is_same_as(found) or (is_whole and end is not None)):
            raise ContentChangedError(
                f"{self.display_name}: the file changed while it was fetched", url=self.display_name
            )
        response.raw.enforce_content_length = False  # rankload's own check reports how many bytes are missing
        return HttpBody(
            found,
            first,
            last,
            is_whole,
            self.display_name,
            functools.partial(response.raw.read1, decode_content=False),
            response.raw.shutdown,
        )

    def _whole(self, response: requests.Response) -> tuple[int, int | None, int | None]:
        try:
            length = content_length_of(response.headers)
        except ValueError:
            got = response.headers["Content-Length"][:80]
            text = f"{self.display_name}: the length that it gives is no number of bytes: {got!r}"
            raise FetchError(text, url=self.display_name) from None
        return 0, length, length

    def _checked_range(self, response: requests.Response, begin: int, end: int | None) -> tuple[int, int, int | None]:
        found = content_range_of(response.headers)
        content_range = self._safe_text(response.headers.get("Content-Range", "(none)"), response)
        got = f"got status 206 and Content-Range {content_range[:80]!r}"
        if end is None and found is not None and found[:1] + found[2:] == (0, found[1]):
            return found
        if end is None:  # no other kind of request is left
            raise FetchError(f"{self.display_name}: requested the whole file, {got}", url=self.display_name)
        if found is None or found[0] != begin or found[1] > end:
            raise UnusableRange(f"{self.display_name}: requested bytes {begin}-{end - 1}, {got}")
        return found

    def _safe_text(self, text: str, response: requests.Response) -> str:
        """Return a server's text for a message: some servers repeat the requested URL in their answers."""
        return redact_text(redact_text(text, response.request.url or ""), self.url.raw)

    def _status_error(self, response: requests.Response) -> HTTPStatusError:
        code = response.status_code
        advice = advice_for(code, is_client_named=self._is_client_named)
        if self._has_answered and code in _EXPIRED:
            advice = ANSWERED_BEFORE
        asked = redact(response.request.url or self.url.raw)
        where = self.display_name if asked == self.display_name else f"{self.display_name} (redirected to {asked})"
        return HTTPStatusError(
            f"HTTP Error {code}: {self._safe_text(str(response.reason), response)[:200]}: {where}{advice}",
            url=self.display_name,
            code=code,
            retry_after_seconds=retry_after_of(response.headers),
        )


def _server_as_asked(url: str) -> Server | None:
    """Return a URL's server, with the host name as requests sends it: another alphabet is encoded in ASCII (IDNA)."""
    try:
        return server_of(requests.Request("GET", url).prepare().url or "")
    except ValueError:  # requests' own subclasses: no request can be sent to this URL
        return None


def _check_proxy(proxy: str | None) -> None:
    """Check that a proxy has a host. For one with a user but no host requests raises a TypeError.

    Raises:
        InvalidProxyURL: it has none.
    """
    if proxy and not parse_url(proxy).host:
        raise requests.exceptions.InvalidProxyURL


def _close_connections(session: requests.Session) -> None:
    """Close a session's idle connections now.

    Session.close() leaves that to the garbage collector (urllib3 2.x). The connections would stay open as long as an
    error is kept whose traceback refers to them.
    """
    adapters = [adapter for adapter in session.adapters.values() if isinstance(adapter, HTTPAdapter)]
    for manager in [one for adapter in adapters for one in (adapter.poolmanager, *adapter.proxy_manager.values())]:
        for key in manager.pools.keys():  # noqa: SIM118 - not a dict, and not iterable
            if (pool := manager.pools.get(key)) is not None:
                pool.close()


def _range_headers(begin: int, end: int | None, version: Version | None) -> dict[str, str]:
    if end is None:
        return {}
    headers = {"Range": f"bytes={begin}-{end - 1}"}
    if version is not None:
        # If-Range takes only a strong validator (RFC 9110, 13.1.5); a weak one is compared with the response's
        validator = version.etag if version.etag and not version.etag.startswith("W/") else version.last_modified
        if validator and _can_be_sent(validator) and not (version.etag or "").startswith("W/"):
            headers["If-Range"] = validator
    return headers


def _conditions(unless: Version | None) -> dict[str, str]:
    """Return the header that requests only another version (RFC 9110, 13.1.2 and 13.1.3)."""
    found = {"If-None-Match": unless.etag, "If-Modified-Since": unless.last_modified} if unless is not None else {}
    usable = [(name, value) for name, value in found.items() if value and _can_be_sent(value)]
    return dict(usable[:1])


def _can_be_sent(validator: str) -> bool:
    """Return whether a validator from an origin or a record may be sent in a request, perhaps to another server.

    The validator may hold control characters, or be longer than servers accept. In another user's record it may be any
    text; the HTTP library refuses a blank at its beginning.
    """
    is_plain = validator.isascii() and validator.isprintable() and validator == validator.strip()
    return is_plain and len(validator) <= _MAX_VALIDATOR_CHARACTERS


def _as_given(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
