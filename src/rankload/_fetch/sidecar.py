"""Sidecars: a file's digest in another file beside it, ``model.pth.sha256``, as sha256sum(1) writes it."""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from rankload._cache.files import wrap_read_errors
from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.origins.credentials import Headers
from rankload._fetch.origins.origin import Claim
from rankload._fetch.origins.registry import origin_for
from rankload._formats.source import open_regular
from rankload._settings import Settings
from rankload._types import Report
from rankload._urls import Url
from rankload.errors import FetchError

_MAX_BYTES = 64 << 10
_DIGEST = re.compile(rb"(?<![0-9a-fA-F])[0-9a-fA-F]{64}(?![0-9a-fA-F])")


def fetch_sidecar(url: Url, headers: Headers, report: Report, settings: Settings) -> Claim:
    """Fetch and read the sidecar of a URL.

    Raises:
        FetchTimeoutError: the sidecar did not come in time (see `read_bounded`).
        FetchError: there is no sidecar, or it does not hold exactly one SHA-256 for this file.
        RankloadError: any error of ``report``.
    """
    parts = urlsplit(url.raw)
    sidecar_url = Url.parse(urlunsplit(parts._replace(path=parts.path + ".sha256")))
    with closing(origin_for(sidecar_url, headers, settings)) as origin:
        answer = read_bounded(origin, 0, None, None, most_bytes=_MAX_BYTES, settings=settings, report=report)
        return _parsed(answer.content, parts.path.rpartition("/")[2], origin.display_name)


def read_sidecar(path: Path) -> Claim:
    """Read the sidecar of a local file.

    Raises:
        CacheError: there is no sidecar, or it cannot be read.
        FetchError: the sidecar does not hold exactly one SHA-256 for this file.
    """
    sidecar = path.with_name(f"{path.name}.sha256")
    with wrap_read_errors(sidecar), open_regular(sidecar) as file:
        return _parsed(file.read(_MAX_BYTES), path.name, str(sidecar))


def _parsed(content: bytes, file_name: str, display_name: str) -> Claim:
    """Return the file's digest: from the line that names the file, else the only digest."""
    lines = [line for line in content[:_MAX_BYTES].splitlines() if _DIGEST.search(line)]
    named = [line for line in lines if line.split()[-1].lstrip(b"*").rpartition(b"/")[2] == os.fsencode(file_name)]
    digests = {match[0].decode().lower() for line in named or lines if (match := _DIGEST.search(line))}
    if len(digests) != 1:
        what = "holds no SHA-256" if not digests else f"holds several digests, and none for {file_name}"
        raise FetchError(f"{display_name}: sidecar=True, but it {what}", url=display_name)
    return Claim(digests.pop(), "sidecar")
