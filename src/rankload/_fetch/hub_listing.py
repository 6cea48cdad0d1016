"""Ask the Hugging Face Hub what is in a repository: its commit, and size and digest of every file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._fetch.transfer.retry import Retries, pause
from rankload._settings import Settings
from rankload._types import Report
from rankload.errors import FetchError, HTTPStatusError

#: Name of a commit of git.
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: Names of blobs: git's SHA-1, or the SHA-256 of a file in Git LFS.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

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

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        settings: deadline and retries.
        report: called during pauses.

    Raises:
        FetchError: the Hub does not answer, or has no such repository or revision, or none for this token.
    """
    key = (os.environ.get("HF_ENDPOINT"), name, revision)
    if is_commit(revision) and (known := _at_commit.get(key)) is not None:
        return known
    display_name = f"hf://{name}" + (f"@{revision}" if revision else "")
    retries, attempt = Retries(settings), 0
    while True:
        attempt += 1
        try:
            found = _ask(name, revision, display_name, settings.progress_seconds)
            break
        except FetchError as error:
            pause(retries.pause_after(error), report or (lambda progress: None), attempt)
    _at_commit[key[0], name, found.commit] = found
    return found


def _ask(name: str, revision: str | None, display_name: str, timeout: float) -> HubListing:
    with wrap_any_errors(display_name, display_name):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=timeout)
        except HfHubHTTPError as error:
            raise _status_error(error, display_name) from None
        blobs = {sibling.rfilename: _blob_of(sibling) for sibling in found.siblings or []}
        if not is_commit(found.sha):
            raise FetchError(f"{display_name}: the Hub names no commit", url=display_name)
        return HubListing(str(found.sha), blobs)


def _blob_of(sibling: Any) -> HubBlob | None:
    name = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return described_blob(name, sibling.lfs.size if sibling.lfs else sibling.size)


def described_blob(name: Any, size_bytes: Any) -> HubBlob | None:
    """Return a blob that an origin describes; None if the name is not a digest, or the size no size."""
    is_described = isinstance(name, str) and _BLOB.fullmatch(name) and isinstance(size_bytes, int) and size_bytes >= 0
    return HubBlob(name, size_bytes) if is_described else None


def _status_error(error: Any, display_name: str) -> HTTPStatusError:
    """Return the error for a status; the message of huggingface_hub has the whole URL and a request id."""
    code = int(error.response.status_code)
    retry_after = error.response.headers.get("Retry-After", "")
    return HTTPStatusError(
        f"HTTP Error {code}: {display_name}: {_ADVICE.get(code, 'the Hub itself failed; try again later')}",
        url=display_name,
        code=code,
        retry_after_seconds=float(retry_after) if retry_after.isdecimal() else None,
    )
