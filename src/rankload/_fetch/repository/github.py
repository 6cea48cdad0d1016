"""What rankload asks GitHub: the default branch, whether a reference is the repository's own, the archive's URL.

The URLs are those that torch.hub asks (torch/hub.py), so that proxies and allow lists made for it suit.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import quote

from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.origins.credentials import Headers
from rankload._fetch.origins.http import HttpOrigin
from rankload._fetch.repository.repository_name import RepositoryName
from rankload._settings import GITHUB_MIRRORS_VARIABLE, Settings
from rankload._types import Report
from rankload._urls import Url
from rankload.errors import ArgumentError, FetchError, HTTPStatusError

_logger = logging.getLogger("rankload")

_GITHUB, _API = "https://github.com", "https://api.github.com"

#: A page of 100 branches or tags has some 30 KiB.
_MAX_PAGE_BYTES = 4 << 20

#: After so many pages (100,000 references) the search ends.
_MAX_PAGES = 1000


def default_branch(name: RepositoryName, report: Report, settings: Settings) -> str:
    """Return ``main`` if the repository has such a branch, else ``master``, as torch.hub does.

    Raises:
        FetchError: neither GitHub nor a mirror answers.
    """
    bases = (_GITHUB, *_mirrors())
    for base in bases:
        try:
            _read(f"{base}/{name.owner}/{name.name}/tree/main/", report, settings, most_bytes=1)
        except HTTPStatusError as error:
            if error.code == 404:
                return "master"
            if base == bases[-1]:
                raise
        except FetchError:
            if base == bases[-1]:
                raise
        else:
            return "main"
    raise AssertionError("there is at least GitHub")


def check_reference(name: RepositoryName, ref: str, report: Report, settings: Settings) -> None:
    """Check that a branch, tag or head commit belongs to the repository: GitHub also serves the commits of forks.

    Raises:
        ArgumentError: it belongs to none.
        FetchError: GitHub's API does not answer.
    """
    for found in _references(name, report, settings):
        if found["name"] == ref or found["commit"]["sha"].startswith(ref):
            return
    raise ArgumentError(
        f"Cannot find {ref} in https://github.com/{name.owner}/{name.name}. If it's a commit from a forked repo, "
        "please call hub.load() with forked repo directly; if it is an older commit, pass skip_validation=True."
    )


def archive_urls(name: RepositoryName, ref: str) -> list[str]:
    """Return the URLs of the archive: GitHub's, then the mirrors'."""
    return [f"{base}/{name.owner}/{name.name}/zipball/{quote(ref)}" for base in (_GITHUB, *_mirrors())]


def _references(name: RepositoryName, report: Report, settings: Settings) -> Iterator[dict[str, Any]]:
    for kind in ("branches", "tags"):
        for page in range(1, _MAX_PAGES):
            url = f"{_API}/repos/{name.owner}/{name.name}/{kind}?per_page=100&page={page}"
            try:
                found = _parsed(_read(url, report, settings, most_bytes=_MAX_PAGE_BYTES), url)
            except FetchError as error:
                if isinstance(error, HTTPStatusError) and error.code in (403, 429):
                    advice = "GitHub limits requests without a token: set GITHUB_TOKEN, or pass skip_validation=True"
                    raise type(error)(f"{error.message}: {advice}", **error.fields) from error
                raise
            if not found:
                break
            yield from found


def _parsed(content: bytes, url: str) -> list[dict[str, Any]]:
    """Return a page of references; a portal that wants a login answers with something else."""
    try:
        found = json.loads(content)
        if all(isinstance(one["name"], str) and isinstance(one["commit"]["sha"], str) for one in found):
            return list(found)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    page = url.partition("?")[0]
    raise FetchError(f"{page}: it does not answer with a list of references; pass skip_validation=True", url=page)


def _read(url: str, report: Report, settings: Settings, *, most_bytes: int) -> bytes:
    """Read a page with GitHub's token, and once more without one if the token is refused."""
    headers = (("Accept", "application/vnd.github+json"),) if url.startswith(_API) else ()
    try:
        return _answer(url, headers, report, settings, most_bytes)
    except HTTPStatusError as error:
        has_token = any(os.environ.get(variable, "").strip() for variable in ("GH_TOKEN", "GITHUB_TOKEN"))
        if error.code not in (401, 403, 404) or not has_token:
            raise
        _logger.debug("%s: refused with the token of the environment; asking without it", error)
    return _answer(url, headers, report, settings, most_bytes, environ={})


def _answer(
    url: str,
    headers: Headers,
    report: Report,
    settings: Settings,
    most_bytes: int,
    environ: Mapping[str, str] = os.environ,
) -> bytes:
    with closing(HttpOrigin(Url.parse(url), headers, settings, environ)) as origin:
        return read_bounded(origin, 0, None, None, most_bytes=most_bytes, settings=settings, report=report).content


def _mirrors() -> list[str]:
    given = os.environ.get(GITHUB_MIRRORS_VARIABLE, "")
    return [mirror.strip().rstrip("/") for mirror in given.split(",") if mirror.strip()]
