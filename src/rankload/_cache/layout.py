"""Where things lie: torch.hub's directory and file names, and our own files beside them.

::

    <directory>/<file name>                                the published file, as torch.hub names it
    <directory>/<file name>.<owner>-<nonce>.partial        a download in progress, or what a dead one has left
    <directory>/<file name>.<owner>-<nonce>.partial.journal    which of its bytes are there
    <directory>/.rankload/<file name>.json                 its record
    <directory>/.rankload/<file name>.lease                who downloads it at the moment
    <directory>/.rankload/quarantine/<file name>           what was not what it should be, and why (.json)
    <directory>/.rankload/<key>/<file name>                another URL with the same file name (and its .rankload/)
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlparse, urlsplit, urlunsplit

from rankload._errors import ArgumentError

#: torch.hub's pattern for the hash prefix in a file name: torch/hub.py HASH_REGEX, first match. It also matches
#: ``model-00001-of-00002.pth`` and ``ckpt-20230101.pth``, so it binds only when check_hash asks for it.
_HASH_PREFIX = re.compile(r"-([a-f0-9]*)\.")

#: Query parameters that sign or authorise a request: they change from request to request for the same file.
#: AWS and Google V4 (X-Amz-*, X-Goog-*), AWS V2 and CloudFront, Azure SAS, and the usual names of tokens.
_SIGNING = re.compile(
    r"x-(amz|goog|oss|cos|ms)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id"
    r"|sv|se|st|sp|sr|sig|skoid|sktid|skt|ske|sks|skv|spr|.*token.*|.*secret.*|.*password.*|api_?key|auth.*|jwt",
    re.IGNORECASE,
)

_OWN_DIRECTORY = ".rankload"

_WEB_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Entry:
    """The paths that belong to one cached file."""

    path: Path

    @property
    def record_path(self) -> Path:
        """The sidecar record."""
        return self.path.parent / _OWN_DIRECTORY / f"{_fitting(self.path.name, 200)}.json"

    @property
    def lease_path(self) -> Path:
        """The lease between jobs."""
        return self.path.parent / _OWN_DIRECTORY / f"{_fitting(self.path.name, 200)}.lease"

    @property
    def quarantine_path(self) -> Path:
        """Where a file of this entry goes that is not what it should be."""
        return self.record_path.parent / "quarantine" / _fitting(self.path.name, 200)

    @property
    def own_directories(self) -> list[Path]:
        """The directories of rankload's own that lead to the file, from the top; none for torch.hub's place."""
        parents = [self.path.parent, *self.path.parent.parents]
        names = [path.name for path in parents]
        return parents[names.index(_OWN_DIRECTORY) :: -1] if _OWN_DIRECTORY in names else []

    @property
    def partial_stem(self) -> str:
        """Start of the name of every partial file of this entry."""
        return _fitting(self.path.name, 120)

    def separate(self, url: str) -> Entry:
        """Return the entry for another URL that has the same file name."""
        return Entry(self.path.parent / _OWN_DIRECTORY / url_key(url)[:16] / self.path.name)


def checkpoints_directory(hub_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return torch.hub's directory for checkpoints: ``$TORCH_HOME/hub/checkpoints``.

    ``hub_dir`` is what torch.hub.set_dir() was given, if it was. ``~`` is expanded.
    """
    if hub_dir is None:
        cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        hub_dir = Path(os.environ.get("TORCH_HOME", os.path.join(cache_home, "torch")), "hub")  # noqa: PTH118 - as torch
    return Path(hub_dir).expanduser().absolute() / "checkpoints"


def file_name_of(url: str) -> str:
    """Return torch.hub's file name for a URL: the last part of its path, without the query, percent-encoded as it is.

    Raises:
        ArgumentError: the URL ends in a slash or has no path.
    """
    name = posixpath.basename(urlparse(url).path)  # not urlsplit: torch drops ``;parameters`` as well
    if name in ("", ".", ".."):
        raise ArgumentError(f"{redact(url)} names no file: pass file_name=", url=redact(url))
    return name


def checked_file_name(name: str) -> str:
    """Return a user's file name if it stays inside the directory.

    Raises:
        ArgumentError: it is empty, absolute, or climbs with ``..``.
    """
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or _OWN_DIRECTORY in path.parts:
        raise ArgumentError(f"file_name={name!r}: expected a relative file name without '..'")
    return name


def hash_prefix_of(file_name: str) -> str | None:
    """Return the hash prefix that torch.hub would read from a file name; None for none or an empty one."""
    match = _HASH_PREFIX.search(file_name)
    return match.group(1) or None if match else None


def local_path_of(url: str) -> Path | None:
    """Return the path that a ``file://`` URL or a plain path means, ``~`` expanded; None for anything else.

    Raises:
        ArgumentError: a file URL names another host; there is no such home directory; no path has zero bytes.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ArgumentError(f"{url}: a file URL cannot name another host; write file:///path")
        return expanded(unquote(parts.path), is_url=True)
    if "://" in url:
        return None
    return expanded(url).absolute()


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


def redact(url: str) -> str:
    """Return a URL fit for logs, errors and records: no password, no query; on the web no user and no fragment either.

    Elsewhere these say which file it is: ``abfs://container@account/file``, ``gs://bucket/file#generation``.
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    query = "…" if parts.query else ""
    if parts.scheme in _WEB_SCHEMES:
        return urlunsplit((parts.scheme, host, parts.path, query, ""))
    return urlunsplit((parts.scheme, f"{user.partition(':')[0]}{at}{host}", parts.path, query, parts.fragment))


def beside(url: str, name: str) -> str:
    """Return the URL of another file in the same folder; a query is meant for the first alone."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    file = quote(name) if parts.scheme in _WEB_SCHEMES else name
    query = parts.query if _grants_folder(parts.query) else ""
    return urlunsplit(parts._replace(path=f"{folder}/{file}", query=query, fragment=""))


def url_key(url: str) -> str:
    """Return a digest that tells two origins apart: hex SHA-256 of the URL without signatures.

    On the web it is without the user, too. Elsewhere what stands before the ``@`` says which file it is, even behind a
    colon (``github://org:repo@main/file``).
    """
    parts = urlsplit(url)
    kept = [(name, value) for name, value in parse_qsl(parts.query, True) if not _SIGNING.fullmatch(name)]
    if parts.scheme in _WEB_SCHEMES:
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2].lower(), fragment="")
    return hashlib.sha256(urlunsplit(parts._replace(query=urlencode(kept))).encode()).hexdigest()


def _fitting(name: str, most_bytes: int) -> str:
    """Return a name, or its beginning and a digest: a file name has at most 255 bytes, and more is to be added."""
    raw = name.encode()
    if len(raw) <= most_bytes:
        return name
    return f"{raw[: most_bytes - 17].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def _grants_folder(query: str) -> bool:
    """Tell whether it is a shared access signature of Azure's for a container, a directory or an account.

    (``sr`` and ``srt`` in learn.microsoft.com, "Create a service SAS" and "Create an account SAS".)
    """
    parameters = dict(parse_qsl(query))
    return "sig" in parameters and (parameters.get("sr") in ("c", "d") or "o" in parameters.get("srt", ""))
