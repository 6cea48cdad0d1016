"""Ask the Hugging Face Hub what is in a repository: its commit, and size and digest of every file."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from rankload._fetch.bounded_read import ReadDeadline
from rankload._fetch.hub_names import check_endpoint
from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._fetch.origins.http_errors import raise_alone
from rankload._fetch.transfer.retry import Retries, pause
from rankload._platform.daemon_threads import DeadlineThread
from rankload._settings import Settings
from rankload._types import Progress, Report
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
        report: called during the wait, and during pauses.

    Raises:
        ArgumentError: ``HF_ENDPOINT`` is no URL.
        FetchTimeoutError: the Hub's answer did not come within ``progress_seconds``.
        FetchError: the Hub does not answer, or has no such repository or revision, or none for this token.
    """
    check_endpoint()
    key = (os.environ.get("HF_ENDPOINT"), name, revision)
    if is_commit(revision) and (known := _at_commit.get(key)) is not None:
        return known
    display_name = f"hf://{name}" + (f"@{revision}" if revision else "")
    report = report or (lambda progress: None)
    with wrap_any_errors(display_name, display_name):
        from huggingface_hub import HfApi  # slow to import: this does not count towards the deadline

        api = HfApi()
    deadline, retries, attempt = ReadDeadline(display_name, settings.progress_seconds), Retries(settings), 0
    while True:
        attempt += 1
        ask = functools.partial(_ask, api, name, revision, display_name, settings.progress_seconds)
        outcome = _await(ask, deadline, report, attempt)
        if isinstance(outcome, HubListing):
            break
        pause(retries.pause_after(outcome), report, attempt)
    _at_commit[key[0], name, outcome.commit] = outcome
    return outcome


def _await(
    ask: Callable[[], HubListing | FetchError], deadline: ReadDeadline, report: Report, attempt: int
) -> HubListing | FetchError:
    """Ask on another thread: the client's own timeout bounds only the wait for the next byte.

    Raises:
        FetchTimeoutError: the deadline passed.
        RankloadError: any error of ``report``.
    """

    def check_cancelled() -> None:
        report(Progress("connecting", 0, None, attempt))
        deadline.check(0)

    report(Progress("connecting", 0, None, attempt))
    deadline.start_try()
    with closing(DeadlineThread("rankload-hub")) as calls:
        outcome = calls.call(ask, on_wait=check_cancelled)
    if not isinstance(outcome, HubListing):
        deadline.check(0)  # the client's timeout is as long as the deadline: then do not retry
    return outcome


def _ask(api: Any, name: str, revision: str | None, display_name: str, timeout: float) -> HubListing | FetchError:
    """Return the Hub's answer, or its error. So an error that the wait raises is always the caller's."""
    try:
        return _answer(api, name, revision, display_name, timeout)
    except FetchError as error:
        return error


def _answer(api: Any, name: str, revision: str | None, display_name: str, timeout: float) -> HubListing:
    with wrap_any_errors(display_name, display_name):
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = api.model_info(name, revision=revision, files_metadata=True, timeout=timeout)
        except HfHubHTTPError as error:
            raise_alone(_status_error(error, display_name))
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
