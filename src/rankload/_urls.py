"""Parse URLs in one place, so that all of rankload agrees on what a URL means.

A URL that two parsers could read differently is refused before any request (`why_refused`). The standard library parses
all others, and also determines where the HTTP library connects. `origins.http` checks that both agree before it sends
credentials to a server.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, unquote_plus, urlparse, urlsplit, urlunsplit

from rankload._signed_queries import grants_folder, without_signature
from rankload._text import printable
from rankload.errors import ArgumentError

WEB_SCHEMES = ("http", "https")

_DEFAULT_PORTS = {"http": 80, "https": 443}

#: A scheme, followed by at least one slash except for http and https. ``runs:7/last.pth`` is a path; ``https:host`` is
#: a mistyped URL.
_SCHEME = re.compile(r"(?:(https?):/*|([a-z][a-z0-9+.:-]*):/+)", re.IGNORECASE)

#: The authority between ``//`` and the path (RFC 3986, 3.2): optional user, host name or IPv6 address, optional port.
#: Host names may use any alphabet (IDNA). An ``@`` in a password must be percent-encoded.
_AUTHORITY = re.compile(r"(?:[^@/\\?#\[\]]*@)?(?:\[[0-9A-Fa-f:.]+\]|[^@:/\\?#\[\]%]+)(?::[0-9]{0,5})?")

#: A URL after something else: a blank or a line break, as in a file that was read; a quotation mark; ``url=``.
_LATER_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

#: Separator between the URLs of an fsspec chain: ``zip://inner.pth::https://host/outer.zip``.
_NEXT_OF_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*:/)")

#: A port that is not a number. It may be the beginning of a password that contains a slash.
_ODD_PORT = re.compile(r"[^@/?#]*:(?![0-9]*(?:[/?#]|$))[^@/?#]*(?:[/?#]|$)")


class Server(NamedTuple):
    """The server of a web URL. Credentials belong to one server."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Url:
    """A parsed URL or path. ``str()`` of it is safe for messages.

    Attributes:
        raw: the URL as the user passed it; may hold secrets.
        display_name: the URL without secrets (`redact`).
        key: digest that distinguishes the URL from other origins (`url_key`).
        scheme: scheme in lower case; None for a path.
        local_path: local path of a file URL or a plain path; None for a remote file.
    """

    raw: str = field(repr=False)
    display_name: str
    key: str
    scheme: str | None
    local_path: Path | None

    @classmethod
    def parse(cls, raw: str) -> Url:
        """Parse a URL or a path.

        Raises:
            ArgumentError: the URL is malformed, libraries may read it differently, or the path is invalid.
        """
        if (why := _why_malformed(raw)) is not None:
            raise ArgumentError(f"url={redact(raw)!r}: malformed URL: {why}")
        return cls(raw, redact(raw), url_key(raw), scheme_of(raw), local_path_of(raw))

    @property
    def server(self) -> Server | None:
        """The server of an http or https URL (`server_of`)."""
        return server_of(self.raw)

    def beside(self, name: str) -> Url:
        """Return the URL of another file in the same folder (`beside`)."""
        return Url.parse(beside(self.raw, name))

    def __str__(self) -> str:
        return self.display_name


def scheme_of(url: str) -> str | None:
    """Return the scheme of a URL, even of a malformed one, in lower case; None for a path."""
    match = _SCHEME.match(url)
    return (match[1] or match[2]).lower() if match else None


def server_of(url: str) -> Server | None:
    """Return the server of an http or https URL; None for other URLs, and for those that parsers read differently."""
    if why_refused(url) is not None:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in WEB_SCHEMES or not parts.hostname:
        return None
    return Server(parts.scheme, parts.hostname, _DEFAULT_PORTS[parts.scheme] if port is None else port)


def why_refused(url: str) -> str | None:
    """Return why a URL is ambiguous or unprintable, for a message; None for a URL that is neither.

    Two libraries once read ``https://:@evil.example\\@good.example/`` differently: one took good.example for the host,
    the other connected to evil.example.
    """
    if not url.isprintable():
        return "it has control characters or line breaks"
    if scheme_of(url) not in WEB_SCHEMES:
        return None
    if any(character.isspace() for character in url):
        return "it has blanks (write %20)"
    if "\\" in url:
        return "it has a backslash (write %5C)"
    if not _AUTHORITY.fullmatch(_authority_of(url)):
        slip = " (a Path drops one of two slashes: pass a string)" if re.match("https?:/[^/]", url) else ""
        return f"its host is missing or malformed{slip}"
    return None


def _why_malformed(url: str) -> str | None:
    """Return why a URL is malformed, for a message; None for a well-formed URL, and for a path."""
    scheme = scheme_of(url)
    if scheme is None:
        return None
    if (why := why_refused(url)) is not None or scheme == "file":
        return why
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:  # unbalanced brackets, or a port that is not a number
        is_complete = False
    return None if is_complete else "it has no host, or its port is not a number"


def has_ambiguous_characters(text: str) -> bool:
    """Return whether a web URL, or a relative reference, has characters that parsers drop, move or replace."""
    return not text.isprintable() or "\\" in text or any(character.isspace() for character in text)


def without_user(url: str) -> str:
    """Return a web URL without its user and password; any other URL unchanged."""
    parts = urlsplit(url)
    if parts.scheme not in WEB_SCHEMES:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def user_of(url: str) -> tuple[str, str] | None:
    """Return the user and password in a URL, percent-decoded; None without a user. The password may be empty."""
    user, at, _ = _authority_of(url).rpartition("@")
    name, _, password = user.partition(":")
    return (unquote(name), unquote(password)) if at else None


def redact(url: str) -> str:
    """Return a URL without secrets, for logs, errors and records. Never raises.

    The result has no password and no query. An http or https URL also loses its user and fragment. For other schemes
    these identify the file: ``abfs://container@account/file``, ``gs://bucket/file#generation``. In a malformed URL,
    everything up to the last ``@`` may be a password.
    """
    match, scheme = _SCHEME.match(url), scheme_of(url)
    if match is None:  # a path, or a mistyped URL
        if later := _LATER_URL.search(url):
            return printable(url[: later.start()]) + redact(url[later.start() :])
        if _HOST_AND_FOLDER.match(url):
            return redact(f"https://{url.lstrip('/')}").partition("://")[2]
        return printable(url)
    if scheme not in WEB_SCHEMES and len(chain := _NEXT_OF_CHAIN.split(url)) > 1:
        return "::".join(map(redact, chain))
    rest = url[match.end() :]
    is_well_formed = match[0].partition(":/")[2] == "/"
    if is_well_formed:
        is_well_formed = why_refused(url) is None if scheme in WEB_SCHEMES else not _ODD_PORT.match(rest)
    if not is_well_formed:
        rest = rest.rpartition("@")[2]
    rest, hash_mark, fragment = rest.partition("#")
    rest, question_mark, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    is_of_no_use = scheme in (*WEB_SCHEMES, "file")
    shown_user = "" if is_of_no_use or not is_well_formed else f"{user.partition(':')[0]}{at}"
    shown_fragment = "" if is_of_no_use else f"{hash_mark}{fragment}"
    shown_query = f"{question_mark}…" if query else ""
    return printable(f"{match[0].lower()}{shown_user}{host}{slash}{path}{shown_query}{shown_fragment}")


def redact_text(text: str, url: str = "") -> str:
    """Return a library's error text without the passwords and queries of URLs in it.

    Args:
        text: text of the error.
        url: the requested URL. Its password and query are removed everywhere: a library may mistake a user and password
            for the name of a bucket, and show that name.
    """
    _, _, password = _authority_of(url).rpartition("@")[0].partition(":")
    for secret in sorted({password, unquote(password), url.partition("?")[2]}, key=len, reverse=True):
        text = text.replace(secret, "…") if secret else text
    return printable(re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S+", "?…", text)))


def file_name_of(url: str) -> str:
    """Return torch.hub's file name for a URL: the last part of its path, without the query, still percent-encoded.

    Raises:
        ArgumentError: the URL ends in a slash, has no path, or ends in a name that is reserved for rankload's files.
    """
    name = posixpath.basename(urlparse(url).path)  # not urlsplit: torch drops ``;parameters``, too
    if name in ("", ".", "..") or is_own_name(name):
        why = "has the name of one of rankload's own files" if name and is_own_name(name) else "names no file"
        raise ArgumentError(f"{redact(url)} {why}: pass file_name=", url=redact(url))
    return name


#: rankload's own directory inside a cache directory. Names of rankload's other files beside it also begin so.
OWN_DIRECTORY = ".rankload"

#: Part of a partial file's name, for a running or interrupted download. The groups are the owner's machine, process id
#: and start time.
OF_A_PARTIAL_FILE = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial")


def is_own_name(name: str) -> bool:
    """Return whether a file name is reserved for rankload's own files, on any filesystem.

    Other files may not have such a name: a download would resume any file that is named like a partial file.
    """
    folded = name.casefold()
    return folded.startswith(OWN_DIRECTORY) or OF_A_PARTIAL_FILE.search(folded) is not None


def local_path_of(url: str) -> Path | None:
    """Return the local path of a ``file://`` URL or a plain path, with ``~`` expanded; None for a remote URL.

    Raises:
        ArgumentError: a file URL names another host, the home directory is unknown, or the path has a zero byte.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ArgumentError(f"{redact(url)}: a file URL cannot name another host; write file:///path")
        return expanded(unquote(parts.path), is_url=True)
    return expanded(url).absolute() if scheme is None else None


def hint_on_scheme(location: str) -> str:
    """Return advice to append to a message on a missing file that looks like a mistyped URL; else an empty string."""
    if _LATER_URL.search(location):
        return "; if a URL is meant, remove what stands before it"
    found = _HOST_AND_FOLDER.match(location)
    return f"; if a URL is meant, write https://{found['host']}…" if found else ""


#: ``example.com/``, ``localhost:8000/`` or ``user:password@host/``, optionally with a user, and after two slashes.
_HOST_AND_FOLDER = re.compile(
    r"(?://)?(?:[^/@]+@)?(?P<host>(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}(?::[0-9]+)?/|[A-Za-z0-9.-]+:[0-9]+/|"
    r"(?<=@)[A-Za-z0-9.-]+/)"
)


def expanded(path: str | os.PathLike[str], *, is_url: bool = False) -> Path:
    """Return a user's path with ``~`` expanded, except in the path of a URL.

    Raises:
        ArgumentError: the home directory is unknown, or the path has a zero byte.
    """
    if "\0" in os.fspath(path):
        raise ArgumentError(f"{os.fspath(path)!r}: a path cannot have a zero byte")
    try:
        return Path(path) if is_url else Path(path).expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"{os.fspath(path)}: {error}") from None


def beside(url: str, name: str) -> str:
    """Return the URL of another file in the same folder. A query is dropped unless it grants the whole folder."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    file = quote(name) if parts.scheme in WEB_SCHEMES else name
    query = parts.query if grants_folder(parts.query) else ""
    return urlunsplit(parts._replace(path=f"{folder}/{file}", query=query, fragment=""))


def url_key(url: str) -> str:
    """Return a digest that identifies an origin: hex SHA-256 of the URL without signatures (`without_signature`).

    The user of an http or https URL is left out, too. For other schemes, the part before the ``@`` identifies the file,
    even after a colon (``github://org:repo@main/file``). So does an apparent query: a key in S3 may contain a ``?``.
    """
    parts = urlsplit(url)
    kept = parts.scheme + url[len(parts.scheme) :]
    if parts.scheme in WEB_SCHEMES:
        host, query = parts.netloc.rpartition("@")[2].lower(), without_signature(parts.query)
        kept = urlunsplit(parts._replace(netloc=host, query=query, fragment=""))
    return hashlib.sha256(kept.encode(errors="surrogateescape")).hexdigest()


#: Longest parameter name that a message shows.
_MAX_PARAMETER_LENGTH = 40


def query_digests(url: str) -> list[list[str]]:
    """Return name and digest of each parameter of a URL's query, except those that sign or authorise the request.

    That is enough to name the parameters in which two URLs differ, without values, which may be secrets. A name without
    a value may be a secret itself, and is returned as an empty string.
    """
    query = url.partition("#")[0].partition("?")[2]
    digests = []
    for piece in filter(None, without_signature(query).split("&")):
        name, _, value = piece.partition("=")
        shown_name = printable(unquote_plus(name)) if value.strip("=") and len(name) <= _MAX_PARAMETER_LENGTH else ""
        digests.append([shown_name, hashlib.sha256(piece.encode(errors="surrogateescape")).hexdigest()[:16]])
    return digests


def _authority_of(url: str) -> str:
    """Return the text between ``//`` and the first character that ends the authority for any parser."""
    scheme, colon, rest = url.partition("://")
    return re.split(r"[/\\?#]", rest, maxsplit=1)[0] if colon and "/" not in scheme else ""
