"""Ask the Hugging Face Hub what is in a repository: its commit, and size and digest of every file."""

from __future__ import annotations

import json
import os
import re
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.hub_names import check_endpoint
from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._fetch.origins.http import HttpOrigin
from rankload._fetch.origins.http_errors import raise_alone
from rankload._settings import Settings
from rankload._types import Report
from rankload._urls import Url
from rankload.errors import FetchError, HTTPStatusError

#: Name of a commit of git.
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: Names of blobs: git's SHA-1, or the SHA-256 of a file in Git LFS.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

#: Largest answer that is read. A repository of 100,000 files has some 30 MB.
_MAX_BYTES = 128 << 20

_ADVICE = {
    401: "the Hub has no such repository, or not for this token (HF_TOKEN)",
    403: "the Hub refuses: its conditions may have to be accepted on its page, by the user of HF_TOKEN",
    404: "the Hub has no such repository or revision, or not for this token (HF_TOKEN)",
    429: "too many requests from this address; try again later",
}

#: What the Hub has said of commits, which never change, by endpoint, repository and commit.
_at_commit: dict[tuple[str | None, str, str | None], HubListing] = {}


@dataclass(frozen=True)
class HubBlob:
    """The content of a file.

    Attributes:
        name: name in huggingface_hub's cache: the SHA-256 of a file in Git LFS, else git's SHA-1 of the content.
        size_bytes: size of the content.
    """

    name: str
    size_bytes: int

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the content; None for a file that is not in Git LFS."""
        return self.name if len(self.name) == 64 else None


@dataclass(frozen=True)
class HubListing:
    """The files of a repository at a commit.

    Attributes:
        commit: name of the commit.
        blobs: content of each file, by its path; None where the Hub, or a proxy of it, does not describe the content.
    """

    commit: str
    blobs: dict[str, HubBlob | None]


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, which never changes."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def list_repository(name: str, revision: str | None, settings: Settings, report: Report | None = None) -> HubListing:
    """Return the files of a repository. A process asks the Hub once for a commit, and each time for a branch.

    The request is rankload's own, like those for the files: huggingface_hub's client follows redirects from https to
    http, and has neither a limit on an answer's size nor a deadline for all of it.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        settings: deadline and retries.
        report: called with the progress.

    Raises:
        ArgumentError: ``HF_ENDPOINT`` is no URL.
        FetchTimeoutError: the Hub's answer did not come in time (see `read_bounded`).
        FetchError: the Hub does not answer, or has no such repository or revision, or none for this token.
        RankloadError: any error of ``report``.
    """
    check_endpoint()
    key = (os.environ.get("HF_ENDPOINT"), name, revision)
    if is_commit(revision) and (known := _at_commit.get(key)) is not None:
        return known
    display_name = f"hf://{name}" + (f"@{revision}" if revision else "")
    found = _parsed(_ask(name, revision, display_name, settings, report or (lambda progress: None)), display_name)
    _at_commit[key[0], name, found.commit] = found
    return found


def _ask(name: str, revision: str | None, display_name: str, settings: Settings, report: Report) -> bytes:
    with wrap_any_errors(display_name, display_name):
        from huggingface_hub import constants

        at_revision = f"/revision/{quote(revision, safe='')}" if revision else ""
        url = Url.parse(f"{constants.ENDPOINT}/api/models/{name}{at_revision}?blobs=true")
    with closing(HttpOrigin(url, (), settings)) as origin:
        origin.display_name = display_name
        try:
            answer = read_bounded(origin, 0, None, None, most_bytes=_MAX_BYTES, settings=settings, report=report)
        except HTTPStatusError as error:
            if error.is_from_another_rank:
                raise
            advice = _ADVICE.get(error.code, "the Hub itself failed; try again later")
            fields = {**error.fields, "url": display_name}
            raise_alone(HTTPStatusError(f"HTTP Error {error.code}: {display_name}: {advice}", **fields))
    if len(answer.content) == _MAX_BYTES:
        raise FetchError(f"{display_name}: the Hub's list of files has {_MAX_BYTES} bytes or more", url=display_name)
    return answer.content


def _parsed(content: bytes, display_name: str) -> HubListing:
    """Return what the Hub says (huggingface_hub, "ModelInfo"); a portal that wants a login says something else."""
    try:
        found = json.loads(content)
        files = [one for one in found.get("siblings") or [] if isinstance(one["rfilename"], str)]
        blobs = {one["rfilename"]: _blob_of(one) for one in files}
        commit = found.get("sha")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text = f"{display_name}: the Hub does not answer with a list of files; is HF_ENDPOINT the address of a Hub?"
        raise FetchError(text, url=display_name) from None
    if not isinstance(commit, str) or not is_commit(commit):
        raise FetchError(f"{display_name}: the Hub names no commit", url=display_name)
    return HubListing(commit, blobs)


def _blob_of(file: dict[str, Any]) -> HubBlob | None:
    if lfs := file.get("lfs"):
        return described_blob(lfs.get("sha256"), lfs.get("size"))
    return described_blob(file.get("blobId"), file.get("size"))


def described_blob(name: Any, size_bytes: Any) -> HubBlob | None:
    """Return a blob that an origin describes; None if the name is not a digest, or the size no size."""
    is_described = isinstance(name, str) and _BLOB.fullmatch(name) and isinstance(size_bytes, int) and size_bytes >= 0
    return HubBlob(name, size_bytes) if is_described else None
