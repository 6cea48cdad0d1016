"""One GET request with requests, and the one place where its exceptions become ours."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import requests
import urllib3

from rankload._cache.layout import redact
from rankload._errors import FetchError, FetchTimeoutError, HTTPStatusError, NetworkError, TruncatedError
from rankload._settings import Settings
from rankload._version import __version__


@dataclass
class Body:
    """A response's body, with what the origin says about it.

    Attributes:
        url: for messages, without secrets.
        size_bytes: Content-Length, or None.
        etag: the validator, or None; never a digest.
        content_type: the media type, lower case, or an empty string.
    """

    url: str
    size_bytes: int | None
    etag: str | None
    content_type: str
    _read1: Callable[[int], bytes]
    _shut_down: Callable[[], None]

    def read(self, limit_bytes: int) -> bytes:
        """Return the next bytes, as many as are there, at most the limit; nothing at the end of the body.

        Raises:
            FetchTimeoutError: no byte within the deadline.
            TruncatedError: a chunked body ended early.
            NetworkError: the connection broke.
        """
        with translating(self.url):
            return self._read1(limit_bytes)

    def break_off(self) -> None:
        """Let a read that waits in another thread return or fail at once."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # the body has ended already
            self._shut_down()


@contextlib.contextmanager
def get(url: str, headers: tuple[tuple[str, str], ...], settings: Settings) -> Iterator[Body]:
    """Open a URL for reading.

    Proxies, CA bundles and netrc are taken from the environment, as requests does. The body comes as stored
    (``Accept-Encoding: identity``): digests are of the file's bytes.

    Raises:
        HTTPStatusError: the origin answered 4xx or 5xx.
        FetchTimeoutError, NetworkError, FetchError: there was no answer.
    """
    sent = {"User-Agent": f"rankload/{__version__}", "Accept-Encoding": "identity", **dict(headers)}
    shown = redact(url)
    with contextlib.ExitStack() as stack:
        with translating(shown):
            session = stack.enter_context(requests.Session())
            if "authorization" in map(str.lower, sent):
                session.auth = _as_given  # or requests would prefer ~/.netrc to the caller's own header
            deadlines = (settings.connect_seconds, settings.progress_seconds)
            response = stack.enter_context(session.get(url, headers=sent, stream=True, timeout=deadlines))
        if response.status_code >= 400:
            raise _status_error(response, shown)
        yield _body_of(response, shown)


def _as_given(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _body_of(response: requests.Response, shown: str) -> Body:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding not in ("identity", ""):
        raise FetchError(
            f"{shown}: sent with Content-Encoding {encoding} although identity was asked for: the bytes are not the "
            "file's, so they cannot be verified",
            url=shown,
        )
    length = response.headers.get("Content-Length", "")
    response.raw.enforce_content_length = False  # our own check says how much is missing
    return Body(
        url=shown,
        size_bytes=int(length) if length.isdigit() else None,
        etag=response.headers.get("ETag"),
        content_type=response.headers.get("Content-Type", "").partition(";")[0].strip().lower(),
        _read1=functools.partial(response.raw.read1, decode_content=False),
        _shut_down=response.raw.shutdown,
    )


def _status_error(response: requests.Response, shown: str) -> HTTPStatusError:
    code = response.status_code
    advice = {
        401: ": the origin wants credentials; pass headers= or use ~/.netrc",
        403: ": the origin refuses; is a token or a fresh signed URL needed?",
        404: ": no such file there; check the URL",
        410: ": the file is gone for good",
        429: ": too many requests from this address; try again later, or prefetch into a shared directory",
    }.get(code, ": the origin's own trouble; try again later, or pass a mirror" if code >= 500 else "")
    where = f"{shown} (redirected to {redact(response.url)})" if response.history else shown
    return HTTPStatusError(f"HTTP Error {code}: {response.reason}: {where}{advice}", url=shown, code=code)


@contextlib.contextmanager
def translating(shown: str) -> Iterator[None]:
    """Translate the exceptions of requests, urllib3 and sockets.

    Theirs hold the full URL, with its signatures and tokens, and so do the tracebacks of what they are chained to: none
    of them goes along.
    """
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise _translated(error, shown) from None


def _translated(error: Exception, shown: str) -> FetchError:
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        what = "no connection" if "Connect" in type(error).__name__ else "not a byte came"
        text = f"{shown}: {what} within the deadline; raise timeout= or pass a mirror"
        return FetchTimeoutError(text, url=shown)
    if isinstance(error, requests.exceptions.InvalidSchema):
        return FetchError(f"{shown}: it redirects to a URL that is not http or https", url=shown)
    if isinstance(error, ValueError):  # requests' own subclasses, and what urllib.parse raises out of a redirect
        return FetchError(f"{shown}: not a URL that can be fetched, or it redirects to one", url=shown)
    if isinstance(error, requests.TooManyRedirects):
        return FetchError(f"{shown}: too many redirects", url=shown)
    if isinstance(error, urllib3.exceptions.ProtocolError) and "IncompleteRead" in str(error):
        return TruncatedError(f"{shown}: the body ended in the middle of a chunk", url=shown)
    return NetworkError(f"{shown}: {_cause_of(error)}", url=shown)


def _cause_of(error: BaseException) -> str:
    """Return the innermost cause in words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, socket.gaierror):
            return f"host name not found ({seen.strerror}); is this node online?"
        if isinstance(seen, ConnectionRefusedError):
            return "connection refused"
        if isinstance(seen, ConnectionResetError):
            return "connection reset by the origin"
        error, seen = seen, _inner(seen)
    without_queries = re.sub(r"\?\S+", "?…", str(error))
    return f"{type(error).__name__}: {without_queries}"


def _inner(error: BaseException) -> BaseException | None:
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return reason
    return error.__cause__ or error.__context__
