"""Which headers go to which host: a token is for the host that it was made for, and for no other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

Headers = tuple[tuple[str, str], ...]

#: Scheme, host and port.
Server = tuple[str, str | None, int | None]


@dataclass(frozen=True)
class TokenRule:
    """Where a token is looked for, and to whom it is sent.

    Attributes:
        hosts: host names, without port. Only over https.
        variables: environment variables, the first that is set counts.
        endpoint_variable: names a server of the user's own that takes the token too, over whatever scheme it says.
    """

    hosts: frozenset[str]
    variables: tuple[str, ...]
    endpoint_variable: str | None = None


#: gh(1) "environment"; huggingface_hub "Environment variables".
TOKEN_RULES = (
    TokenRule(
        frozenset({"github.com", "api.github.com", "codeload.github.com", "raw.githubusercontent.com"}),
        ("GH_TOKEN", "GITHUB_TOKEN"),
    ),
    TokenRule(frozenset({"huggingface.co"}), ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), "HF_ENDPOINT"),
)


def headers_for(url: str, origin_url: str, given: Headers, environ: Mapping[str, str] = os.environ) -> Headers:
    """Return what to send beside the protocol's own headers when asking ``url``, a redirect's target perhaps.

    Args:
        url: the one that is asked now.
        origin_url: the one that the caller's headers are meant for.
        given: the caller's headers. They go to that scheme, host and port alone.
        environ: where tokens are looked for.
    """
    parts, origin = urlsplit(url), urlsplit(origin_url)
    sent = given if _server(parts) == _server(origin) else ()
    if any(name.lower() == "authorization" for name, _ in sent) or parts.username:
        return sent
    token = _token_for(parts, environ)
    return (*sent, ("Authorization", f"Bearer {token}")) if token else sent


def server_of(url: str) -> Server | None:
    """Return scheme, host and port of an http or https URL; None for what is no such URL."""
    try:
        server = _server(urlsplit(url))
    except ValueError:  # brackets that do not match, a port that is no number
        return None
    return server if server[0] in ("http", "https") and server[1] else None


def _token_for(parts: SplitResult, environ: Mapping[str, str]) -> str | None:
    for rule in TOKEN_RULES:
        endpoint = server_of(environ.get(rule.endpoint_variable, "")) if rule.endpoint_variable else None
        is_its_own = endpoint is not None and _server(parts) == endpoint
        if is_its_own or (parts.scheme == "https" and parts.port in (None, 443) and parts.hostname in rule.hosts):
            found = next((environ[name].strip() for name in rule.variables if environ.get(name, "").strip()), None)
            found = found or (_hugging_face_login(environ) if rule.endpoint_variable else None)
            # what cannot stand in a header is no token; the HTTP library's complaint would show it
            return found if found and found.isascii() and found.isprintable() else None
    return None


def _hugging_face_login(environ: Mapping[str, str]) -> str | None:
    """Return what ``hf auth login`` has stored, unless its use is switched off."""
    if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _server(parts: SplitResult) -> Server:
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default
