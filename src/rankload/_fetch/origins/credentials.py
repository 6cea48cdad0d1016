"""Decide which headers go to which server. A token goes only to the hosts that it was made for."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from requests.utils import get_netrc_auth

from rankload._fetch.models import FetchRequest
from rankload._urls import Server, Url, server_of, user_of

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TokenRule:
    """Sources of a token, and the servers that get it.

    Attributes:
        hosts: host names, without port. The token is sent to them only over https.
        variables: environment variables that may hold the token. The first one set counts.
        endpoint_variable: environment variable that names the user's own server. The server gets the token, too, over
            the scheme in the variable.
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


class Credentials:
    """Credentials for one URL's server, and for the servers that its redirects lead to.

    Args:
        url: URL that the caller's headers are meant for. Its user and password and its entry in ~/.netrc count, too.
        given: headers that the caller passed.
        environ: environment variables that may hold tokens.
        server: server of the URL as requests are sent to it, if its spelling differs from the URL's.
    """

    def __init__(
        self, url: str, given: Headers, environ: Mapping[str, str] = os.environ, *, server: Server | None = None
    ) -> None:
        self._server, self._given, self._environ = server or server_of(url), given, environ
        self._user = user_of(url)

    def headers_for(self, server: Server) -> Headers:
        """Return the headers to send to a server besides the protocol's own.

        The caller's headers, user and netrc entry go only to their own scheme, host and port. The User-Agent goes to
        every server. Tokens go to the hosts of `TOKEN_RULES`. The order of precedence is: the caller's headers, the
        URL's user, a token, netrc.
        """
        is_own = server == self._server
        sent = self._given if is_own else _without_credentials(self._given)
        if any(name.lower() == "authorization" for name, _ in sent):
            return sent
        if is_own and self._user is not None:
            return (*sent, ("Authorization", basic_authorization(*self._user)))
        if token := _token_for(server, self._environ):
            return (*sent, ("Authorization", f"Bearer {token}"))
        if is_own and (login := _netrc_login(server)):
            return (*sent, ("Authorization", basic_authorization(*login)))
        return sent


def headers_of(request: FetchRequest, url: Url) -> Headers:
    """Return the caller's headers for one of a request's URLs. Only the first URL's server gets more than User-Agent.

    A mirror must not get the token of another origin. Nor may the same host get it over another scheme: a token for
    https must not be sent in the clear.
    """
    if url == request.url:
        return request.headers
    server = url.server
    is_first = server is not None and server == request.url.server
    return request.headers if is_first else _without_credentials(request.headers)


def basic_authorization(user: str, password: str) -> str:
    """Return the value of an Authorization header, in UTF-8 as RFC 7617 recommends."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _without_credentials(headers: Headers) -> Headers:
    """Return only the User-Agent, which any server may get: browsers and curl also keep it across redirects."""
    return tuple((name, value) for name, value in headers if name.lower() == "user-agent")


def _netrc_login(server: Server) -> tuple[str, str] | None:
    host = f"[{server.host}]" if ":" in server.host else server.host
    try:
        return get_netrc_auth(f"{server.scheme}://{host}")
    except UnicodeDecodeError:  # requests passes over other malformed files, but not over one in another encoding
        return None


def _token_for(server: Server, environ: Mapping[str, str]) -> str | None:
    for rule in TOKEN_RULES:
        endpoint = server_of(environ.get(rule.endpoint_variable, "")) if rule.endpoint_variable else None
        if server == endpoint or (server.scheme == "https" and server.port == 443 and server.host in rule.hosts):
            found = next((environ[name].strip() for name in rule.variables if environ.get(name, "").strip()), None)
            found = found or (_hugging_face_login(environ) if rule.endpoint_variable else None)
            # a text that is invalid in a header is no token, and the HTTP library's error would show it
            return found if found and found.isascii() and found.isprintable() else None
    return None


def _hugging_face_login(environ: Mapping[str, str]) -> str | None:
    """Return the token that ``hf auth login`` stored, unless its use is switched off."""
    if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(environ.get("HF_TOKEN_PATH") or f"{home}/token")
    try:
        return path.expanduser().read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: the home directory is unknown
        return None
