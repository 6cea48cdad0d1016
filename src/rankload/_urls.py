"""URLs: parsed in one place, so that all of rankload agrees on what a URL means.

Whatever two parsers could read differently is refused before anything is asked (`why_refused`). The rest is read with
the standard library's parser, which also tells the HTTP library where to connect; `origins.http` checks that the two
agree before it sends anything that belongs to a server.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlparse, urlsplit, urlunsplit

from rankload._text import printable
from rankload.errors import ArgumentError

WEB_SCHEMES = ("http", "https")

_DEFAULT_PORTS = {"http": 80, "https": 443}

#: A scheme, and a slash at least unless it is the web's. ``runs:7/last.pth`` is a path; ``https:host`` is a slip.
_SCHEME = re.compile(r"(?:(https?):/*|([a-z][a-z0-9+.:-]*):/+)", re.IGNORECASE)

#: What may stand between ``//`` and the path (RFC 3986, 3.2): perhaps a user, a host name or an IPv6 address, perhaps a
#: port. Host names may be of any alphabet (IDNA). An ``@`` in a password has to be percent-encoded.
_AUTHORITY = re.compile(r"(?:[^@/\\?#\[\]]*@)?(?:\[[0-9A-Fa-f:.]+\]|[^@:/\\?#\[\]%]+)(?::[0-9]{0,5})?")


#: Between the URLs of a chain of fsspec's: ``zip://inner.pth::https://host/outer.zip``.
_NEXT_OF_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*:/)")

#: A port that is no number: that may be the beginning of a password with a slash in it.
_ODD_PORT = re.compile(r"[^@/?#]*:(?![0-9]*(?:[/?#]|$))[^@/?#]*(?:[/?#]|$)")


class Server(NamedTuple):
    """Where a web URL leads: what credentials belong to."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Url:
    """A URL, or a path, parsed once. As a string it is fit for messages.

    Attributes:
        raw: as the user gave it; may hold secrets.
        display_name: the same without secrets (`redact`).
        key: tells it from other origins (`url_key`).
        scheme: in lower case; None for a path.
        local_path: what a path or a file URL means; None for a remote file.
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
            ArgumentError: a malformed URL, one that libraries may read differently, or a path that cannot be one.
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
    """Return the scheme of what looks like a URL, malformed or not, in lower case; None for a path."""
    match = _SCHEME.match(url)
    return (match[1] or match[2]).lower() if match else None


def server_of(url: str) -> Server | None:
    """Return the server of an http or https URL; None for anything else, and for what parsers may disagree on."""
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
    """Return what makes a URL ambiguous or unprintable, in words; None for one that is neither.

    Two libraries once read ``https://:@evil.example\\@good.example/`` differently: one decided that it was
    good.example's, the other connected to evil.example.
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
    """Return what is wrong with a URL, in words; None for a well-formed one, and for a path."""
    scheme = scheme_of(url)
    if scheme is None:
        return None
    if (why := why_refused(url)) is not None or scheme == "file":
        return why
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is no number
        is_complete = False
    return None if is_complete else "it has no host, or its port is no number"


def has_ambiguous_characters(text: str) -> bool:
    """Return whether a web URL, or a relative reference, has characters that parsers drop, move or take for others."""
    return not text.isprintable() or "\\" in text or any(character.isspace() for character in text)


def without_user(url: str) -> str:
    """Return a web URL without its user and password; any other URL as it is."""
    parts = urlsplit(url)
    if parts.scheme not in WEB_SCHEMES:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def user_of(url: str) -> tuple[str, str] | None:
    """Return the user and password that a URL carries, percent-decoded; the password may be empty. None for no user."""
    user, at, _ = _authority_of(url).rpartition("@")
    name, _, password = user.partition(":")
    return (unquote(name), unquote(password)) if at else None


def redact(url: str) -> str:
    """Return a URL fit for logs, errors and records: no password, no query; on the web no user and no fragment either.

    Elsewhere these tell which file it is: ``abfs://container@account/file``, ``gs://bucket/file#generation``. Of a
    malformed URL everything up to its last ``@`` may be a password. Never raises.
    """
    match, scheme = _SCHEME.match(url), scheme_of(url)
    if match is None:  # a path
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
    """Return a library's error text without the passwords and queries of URLs that it may show.

    Args:
        text: the error's.
        url: what was asked for. Its password and query are taken out wherever they stand: a library may take a user
            and password for the name of a bucket, and show that.
    """
    _, _, password = _authority_of(url).rpartition("@")[0].partition(":")
    for secret in sorted({password, unquote(password), url.partition("?")[2]}, key=len, reverse=True):
        text = text.replace(secret, "…") if secret else text
    return printable(re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S+", "?…", text)))


def file_name_of(url: str) -> str:
    """Return torch.hub's file name for a URL: the last part of its path, without the query, percent-encoded as it is.

    Raises:
        ArgumentError: the URL ends in a slash or has no path, or in a name that rankload's own files have.
    """
    name = posixpath.basename(urlparse(url).path)  # not urlsplit: torch drops ``;parameters`` as well
    if name in ("", ".", "..") or is_own_name(name):
        why = "has the name of one of rankload's own files" if name and is_own_name(name) else "names no file"
        raise ArgumentError(f"{redact(url)} {why}: pass file_name=", url=redact(url))
    return name


#: rankload's own directory inside a cache directory. What lies beside it and is rankload's own begins so, too,
OWN_DIRECTORY = ".rankload"

#: or has this in its name: it belongs to a download in progress, or to one that was broken off. In groups its machine,
#: process id and the time that process began.
OF_A_PARTIAL_FILE = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial")


def is_own_name(name: str) -> bool:
    """Return whether a file name is one of rankload's own, on any filesystem.

    Nothing else may be called so: a download would go on with what has the name of a partial file.
    """
    folded = name.casefold()
    return folded.startswith(OWN_DIRECTORY) or OF_A_PARTIAL_FILE.search(folded) is not None


def local_path_of(url: str) -> Path | None:
    """Return the path that a ``file://`` URL or a plain path means, ``~`` expanded; None for anything else.

    Raises:
        ArgumentError: a file URL names another host; there is no such home directory; no path has zero bytes.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ArgumentError(f"{redact(url)}: a file URL cannot name another host; write file:///path")
        return expanded(unquote(parts.path), is_url=True)
    return expanded(url).absolute() if scheme is None else None


def hint_on_scheme(location: str) -> str:
    """Return what to do about a missing file that looks like a URL without a scheme, to be appended to a message."""
    found = _HOST_AND_FOLDER.match(location)
    return f"; if a URL is meant, write https://{found['host']}…" if found else ""


#: ``example.com/``, or ``localhost:8000/``, perhaps with a user
_HOST_AND_FOLDER = re.compile(
    r"(?:[^/@]+@)?(?P<host>(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}(?::[0-9]+)?/|[A-Za-z0-9.-]+:[0-9]+/)"
)


def expanded(path: str | os.PathLike[str], *, is_url: bool = False) -> Path:
    """Return a user's path, with its ``~`` expanded; none in a URL.

    Raises:
        ArgumentError: there is no such home directory, or the path has a zero byte.
    """
    if "\0" in os.fspath(path):
        raise ArgumentError(f"{os.fspath(path)!r}: a path cannot have a zero byte")
    try:
        return Path(path) if is_url else Path(path).expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"{os.fspath(path)}: {error}") from None


def beside(url: str, name: str) -> str:
    """Return the URL of another file in the same folder; a query is meant for the first alone."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    file = quote(name) if parts.scheme in WEB_SCHEMES else name
    query = parts.query if _grants_folder(parts.query) else ""
    return urlunsplit(parts._replace(path=f"{folder}/{file}", query=query, fragment=""))


def url_key(url: str) -> str:
    """Return a digest that tells two origins apart: hex SHA-256 of the URL without signatures (`_SIGNED_QUERIES`).

    On the web it is without the user, too. Elsewhere what stands before the ``@`` says which file it is, even behind a
    colon (``github://org:repo@main/file``), and so does what looks like a query: a ``?`` may stand in a key of S3.
    """
    parts = urlsplit(url)
    kept = parts.scheme + url[len(parts.scheme) :]
    if parts.scheme in WEB_SCHEMES:
        host, query = parts.netloc.rpartition("@")[2].lower(), _without_signature(parts.query)
        kept = urlunsplit(parts._replace(netloc=host, query=query, fragment=""))
    return hashlib.sha256(kept.encode(errors="surrogateescape")).hexdigest()


#: Queries that sign a request differ from request to request for the same file. A query is a signed one if it has all
#: of the first names; then all names of both kinds are left out. Names are compared exactly, without regard to case.
_SIGNED_QUERIES: tuple[tuple[frozenset[str], frozenset[str]], ...] = tuple(
    (frozenset(required.split()), frozenset(f"{required} {others}".split()))
    for required, others in (
        # Amazon S3 API, "Authenticating Requests: Using Query Parameters (AWS Signature Version 4)"
        (
            "x-amz-signature",
            "x-amz-algorithm x-amz-credential x-amz-date x-amz-expires x-amz-signedheaders x-amz-security-token "
            "x-amz-content-sha256",
        ),
        # Google Cloud Storage, "Signed URLs", V4
        ("x-goog-signature", "x-goog-algorithm x-goog-credential x-goog-date x-goog-expires x-goog-signedheaders"),
        # version 2 of Amazon S3, Google Cloud Storage, Alibaba OSS and Huawei OBS
        ("awsaccesskeyid signature expires", "x-amz-security-token"),
        ("googleaccessid signature expires", ""),
        ("ossaccesskeyid signature expires", "security-token"),
        ("accesskeyid signature expires", "x-obs-security-token"),
        # Amazon CloudFront Developer Guide, "Use signed URLs": canned and custom policies
        ("key-pair-id signature", "expires policy hash-algorithm"),
        # Azure Storage, "Create a service SAS", "… an account SAS", "… a user delegation SAS"
        (
            "sig sv",
            "ss srt sr st se sp sip spr si sdd ses saoid suoid scid skoid sktid skt ske sks skv",
        ),
        # Alibaba OSS, signature version 4. Not x-oss-process: it asks for other bytes.
        (
            "x-oss-signature",
            "x-oss-signature-version x-oss-credential x-oss-date x-oss-expires x-oss-additional-headers "
            "x-oss-security-token",
        ),
        # Tencent COS, "Request Signature"
        (
            "q-signature",
            "q-sign-algorithm q-ak q-sign-time q-key-time q-header-list q-url-param-list x-cos-security-token",
        ),
    )
)

#: Parameters that authorise by themselves.
_TOKENS = frozenset(
    ("access_token", "auth_token", "private_token", "job_token", "token", "api_key", "api-key", "apikey", "jwt")
)


#: After a semicolon, another parameter.
_NEXT_PARAMETER = re.compile(r";[^=;]+=")


def _without_signature(query: str) -> str:
    """Return a query without what signs or authorises the request; the rest keeps its bytes and their order.

    A semicolon separates parameters for some servers: ``token=x;file=a`` is not left out, since it names a file there.
    Nor is a name without a value: ``?token`` is a file of that name.
    """
    if not query:
        return query
    pieces = query.split("&")
    names = [unquote_plus(piece.partition("=")[0]).lower() for piece in pieces]
    is_one_value = ["=" in piece and not _NEXT_PARAMETER.search(piece) for piece in pieces]
    left_out = set(_TOKENS)
    for required, all_names in _SIGNED_QUERIES:
        if required.issubset(names):
            left_out |= all_names
    kept = (not (is_one and name in left_out) for name, is_one in zip(names, is_one_value, strict=True))
    return "&".join(itertools.compress(pieces, kept))


#: Longer names in queries are not shown.
_MAX_PARAMETER_LENGTH = 40


def query_digests(url: str) -> list[list[str]]:
    """Return name and digest of each parameter of a URL's query, without what signs or authorises the request.

    Enough to say which parameters of two URLs differ; any value may be a secret. What has no value may be one itself,
    and its name is left empty.
    """
    query = url.partition("#")[0].partition("?")[2]
    digests = []
    for piece in filter(None, _without_signature(query).split("&")):
        name, _, value = piece.partition("=")
        shown_name = printable(unquote_plus(name)) if value.strip("=") and len(name) <= _MAX_PARAMETER_LENGTH else ""
        digests.append([shown_name, hashlib.sha256(piece.encode(errors="surrogateescape")).hexdigest()[:16]])
    return digests


def _authority_of(url: str) -> str:
    """Return what stands between ``//`` and the first character that ends it for any parser."""
    scheme, colon, rest = url.partition("://")
    return re.split(r"[/\\?#]", rest, maxsplit=1)[0] if colon and "/" not in scheme else ""


def _grants_folder(query: str) -> bool:
    """Return whether a query is a shared access signature of Azure's for a container, a directory or an account.

    (``sr`` and ``srt`` in learn.microsoft.com, "Create a service SAS" and "Create an account SAS".)
    """
    parameters = dict(parse_qsl(query))
    return "sig" in parameters and (parameters.get("sr") in ("c", "d") or "o" in parameters.get("srt", ""))
