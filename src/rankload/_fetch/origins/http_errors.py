"""Translate the exceptions of requests, urllib3 and sockets into FetchErrors."""

from __future__ import annotations

import socket
import ssl
from types import TracebackType
from typing import NoReturn

import requests
import urllib3

from rankload._fetch.origins.trust import CERTIFICATE_VARIABLES
from rankload._urls import redact_text
from rankload.errors import FetchError, FetchTimeoutError, NetworkError, TruncatedError

_PROXY = "the proxy that the environment names"


class wrap_http_errors:
    """Translate the exceptions of requests, urllib3 and sockets.

    The original exceptions, and the tracebacks of their causes, hold the full URL with its signatures and tokens. So
    the new error is chained to none of them, not even as its context.

    Args:
        display_name: the URL for messages, without secrets.
    """

    def __init__(self, display_name: str) -> None:
        self._display_name = display_name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, FetchError):  # already translated; a FetchError is an OSError, too
            return
        if isinstance(error, (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)):
            raise_alone(_translated(error, self._display_name))


def raise_alone(error: FetchError) -> NoReturn:
    """Raise an error without the exception that is being handled as its context.

    ``raise … from None`` only keeps the context out of tracebacks: ``error.__context__`` still refers to it.
    """
    try:
        raise error
    except FetchError:
        error.__context__ = None
        raise


def _translated(error: Exception, display_name: str) -> FetchError:
    innermost = _innermost(error)
    is_proxys = isinstance(error, requests.exceptions.ProxyError)
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    if isinstance(error, timeouts) or isinstance(innermost, TimeoutError):
        what = "not a byte came"
        if is_proxys or isinstance(error, requests.ConnectTimeout):
            what = "no connection to the proxy" if is_proxys else "no connection"
        text = f"{display_name}: {what} within the deadline; raise timeout= or pass a mirror"
        return FetchTimeoutError(text, url=display_name)
    if isinstance(error, requests.exceptions.InvalidProxyURL):
        return FetchError(f"{display_name}: {_PROXY} has an invalid URL: correct it, or unset it", url=display_name)
    if isinstance(error, requests.exceptions.InvalidSchema):
        if "SOCKS" in str(error):
            return FetchError(f"{display_name}: {_PROXY} uses SOCKS: pip install 'requests[socks]'", url=display_name)
        return FetchError(f"{display_name}: it redirects to a URL that is not http or https", url=display_name)
    if isinstance(error, ValueError):  # requests' own subclasses, and errors of urllib.parse in a redirect
        return FetchError(f"{display_name}: this URL, or a redirect from it, cannot be fetched", url=display_name)
    if isinstance(error, urllib3.exceptions.ProtocolError) and "IncompleteRead" in str(error):
        return TruncatedError(f"{display_name}: the body ended in the middle of a chunk", url=display_name)
    who = f"{_PROXY}: " if is_proxys else ""
    return NetworkError(
        f"{display_name}: {who}{_words(innermost)}", url=display_name, is_permanent=_is_permanent(innermost)
    )


def _words(cause: BaseException) -> str:
    if isinstance(cause, socket.gaierror):
        return f"host name not found ({cause.strerror}); is this node online?"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(cause, ConnectionResetError):
        return "connection reset by the origin"
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = f"if the site has its own certificates, name them in one of {', '.join(CERTIFICATE_VARIABLES)}"
        return f"{type(cause).__name__}: {redact_text(str(cause))}; {advice}"
    return f"{type(cause).__name__}: {redact_text(str(cause))}"


def _is_permanent(cause: BaseException) -> bool:
    """Return whether a retry is pointless: the host name does not exist, or the certificate is invalid."""
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_NONAME
    return isinstance(cause, ssl.SSLCertVerificationError)


def _innermost(error: BaseException) -> BaseException:
    """Follow an error's causes down to the first specific one, else to the last."""
    seen: BaseException | None = error
    while seen is not None:
        error = seen
        if isinstance(seen, (socket.gaierror, ConnectionRefusedError, ConnectionResetError, ssl.SSLError)):
            break
        reason = getattr(seen, "reason", None)
        seen = reason if isinstance(reason, BaseException) else seen.__cause__ or seen.__context__
    return error
