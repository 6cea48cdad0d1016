"""Advice on HTTP error statuses. Pure."""

from __future__ import annotations

_ADVICE = {
    202: ": the origin has yet to prepare the file; try again later",
    401: ": the origin requires credentials; pass headers= or use ~/.netrc",
    403: ": the origin refuses; is a token or a fresh signed URL needed?",
    404: ": no such file there; check the URL",
    407: ": the proxy requires a user and a password; set them in http_proxy (http://user:password@host:port)",
    410: ": the file is gone for good",
    429: ": too many requests from this address; try again later, or prefetch into a shared directory",
}

#: Web application firewalls refuse clients that they do not know.
_CLIENT_HINT = """ Some sites refuse unknown clients: headers={"User-Agent": "Mozilla/5.0"} sends another name"""

#: Advice if a URL that has answered before now refuses.
ANSWERED_BEFORE = ": it has answered before; the URL may serve one download only, or have expired; get a new one"


def advice_for(code: int, *, is_client_named: bool) -> str:
    """Return advice on a status, to append to the URL in a message; an empty string if there is none.

    Args:
        code: HTTP status code.
        is_client_named: whether the caller passed a User-Agent.
    """
    advice = _ADVICE.get(code, ": the origin itself failed; try again later, or pass a mirror" if code >= 500 else "")
    return advice + _CLIENT_HINT if code == 403 and not is_client_named else advice
