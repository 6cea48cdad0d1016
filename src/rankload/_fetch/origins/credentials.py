"""Which headers go to which host: a token goes to the host that it was made for, and to no other."""

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


class Credentials:
    """What belongs to one URL's server, and to the servers that redirects lead to.

    Args:
        url: the one that the caller's headers, its own user and password, and ~/.netrc's entry are meant for.
        given: the caller's headers.
        environ: where tokens are looked for.
        server: the URL's, if it is written differently where it is asked.
    """

    def __init__(
        self, url: str, given: Headers, environ: Mapping[str, str] = os.environ, *, server: Server | None = None
    ) -> None:
        self._server, self._given, self._environ = server or server_of(url), given, environ
        self._user = user_of(url)

    def headers_for(self, server: Server) -> Headers:
        """Return what to send to a server beside the protocol's own headers.

        The caller's headers, user and netrc entry go to their own scheme, host and port alone, but for the User-Agent;
        tokens to the hosts of `TOKEN_RULES`. What the caller gives comes first, then the URL's user, then a token, then
        netrc.
        """
        is_own = server == self._server
        sent = self._given if is_own else _without_credentials(self._given)
        if any(name.lower() == "authorization" for name, _ in sent):
            return sent
        if is_own and self._user is not None:
            return (*sent, ("Authorization", basic_authorization(*self._user)))
        if token := _token_for(server, self._environ):
            return (*sent, ("Authorization", f"Bearer {token}"))
        host = f"[{server.host}]" if ":" in server.host else server.host
        if is_own and (login := get_netrc_auth(f"{server.scheme}://{host}")):
            return (*sent, ("Authorization", basic_authorization(*login)))
        return sent


def headers_of(request: FetchRequest, url: Url) -> Headers:
    """Return the caller's headers for one of a request's URLs: all but the User-Agent are for the first one's server.

    A token for one origin is no mirror's business. Nor is it the same host's over another scheme: what goes over https
    is not to be sent in the clear.
    """
    if url == request.url:
        return request.headers
    server = url.server
    is_first = server is not None and server == request.url.server
    return request.headers if is_first else _without_credentials(request.headers)


def basic_authorization(user: str, password: str) -> str:
    """Return the value of an Authorization header (RFC 7617); UTF-8, as it recommends."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _without_credentials(headers: Headers) -> Headers:
    """Return what is sent to any server: the name of the client, as browsers and curl send it along redirects, too."""
    return tuple((name, value) for name, value in headers if name.lower() == "user-agent")


def _token_for(server: Server, environ: Mapping[str, str]) -> str | None:
    for rule in TOKEN_RULES:
        endpoint = server_of(environ.get(rule.endpoint_variable, "")) if rule.endpoint_variable else None
        if server == endpoint or (server.scheme == "https" and server.port == 443 and server.host in rule.hosts):
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
    path = Path(environ.get("HF_TOKEN_PATH") or f"{home}/token")
    try:
        return path.expanduser().read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: no such user's home directory
        return None
