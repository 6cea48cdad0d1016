"""Decide what to do about a request, given the state of its cache entry. Pure: a test covers each case in a line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

from rankload._cache.record import Record
from rankload._fetch.digests import claims_of, satisfies
from rankload._fetch.models import FetchRequest
from rankload._text import printable


class Action(Enum):
    """The leader's next step."""

    USE = "use the cached file; its record vouches for it"
    CHECK = "check the cached file's structure, and its digest where one is known; then use it"
    DOWNLOAD = "download"
    REPLACE = "the cached file is damaged: set it aside and download"
    ASK = "ask the origin for the digest first"
    SEPARATE = "the file is not this URL's: use a separate entry"


@dataclass(frozen=True)
class Cached:
    """The state of a cache entry.

    Attributes:
        status: status of the file; None without a file.
        record: record of the file; None if there is none, or none that can be read.
        problem: why an existing record cannot be read; else empty.
        is_trusted: whether file and record both belong to this user or root. If the caller passed a digest, another
            user's file and record are never trusted.
        is_replaceable: whether rankload published this file, and this user may replace it. Other files are never moved
            or replaced: they may belong to anyone.
        is_of_one_url: whether the entry is in a folder for the request's first URL only. Another URL in the record is
            then that of a mirror, which an earlier call passed.
    """

    status: os.stat_result | None
    record: Record | None
    problem: str = ""
    is_trusted: bool = True
    is_replaceable: bool = False
    is_of_one_url: bool = False


@dataclass(frozen=True)
class Decision:
    """An action and its reason, for a log line."""

    action: Action
    reason: str


def decide(request: FetchRequest, cached: Cached) -> Decision:
    """Return the next step for a request."""
    status, record = cached.status, cached.record
    if status is None:
        return Decision(Action.DOWNLOAD, "not cached")
    if record is not None and not _is_owner(request, record):  # check this first: another URL's file must stay
        if cached.is_of_one_url and cached.is_replaceable:
            return Decision(
                Action.DOWNLOAD, f"it came from {printable(record.url)}, which is not one of the mirrors now"
            )
        return Decision(Action.SEPARATE, f"{printable(record.url)} has the same file name")
    if status.st_size == 0:
        return _instead(cached, Action.DOWNLOAD, "the cached file is empty")
    if cached.problem:  # the file's URL is unknown, but a digest can show that its bytes are right
        is_known = request.sha256 is not None
        return Decision(Action.CHECK if is_known else Action.SEPARATE, cached.problem)
    if record is None and request.needs_sidecar:
        return Decision(Action.ASK, "a file without a record, for which the sidecar at the origin must vouch")
    if record is None:
        return Decision(Action.CHECK, "a file without a record, as torch.hub leaves it")
    if record.size_bytes != status.st_size:
        return _instead(cached, Action.REPLACE, f"the cached file has {status.st_size} bytes, not {record.size_bytes}")
    if request.needs_sidecar and not (record.vouched_by == "sidecar" and cached.is_trusted):
        return Decision(Action.ASK, "the cached file has not been compared with its sidecar at the origin yet")
    if not cached.is_trusted and claims_of(request):
        return Decision(Action.CHECK, "a digest is expected, and another user has written the file or its record")
    if request.verify == "never" and (record.sha256 is None or satisfies(record.sha256, request)):
        return Decision(Action.USE, "verify='never'")
    if request.verify == "always":
        return Decision(Action.CHECK, "verify='always'")
    if not record.vouches_for(status):
        return Decision(Action.CHECK, "the cached file was touched or copied since its record was written")
    if request.sha256_source == "sidecar" and record.vouched_by != "sidecar":
        return Decision(Action.CHECK, "its sidecar will vouch for it from now on")
    if satisfies(record.sha256, request):
        return Decision(Action.USE, "its record vouches for it")
    if record.sha256 is None:
        return Decision(Action.CHECK, "a digest is expected, and the cached file has not been hashed yet")
    return _instead(
        cached, Action.DOWNLOAD, f"the cached file has digest {printable(record.sha256[:16])}…, another one is expected"
    )


def after_check(cached: Cached, *, is_damaged: bool, reason: str) -> Decision:
    """Return the next step for a file that failed its check.

    Args:
        cached: state of the entry.
        is_damaged: whether the file is damaged; False if it is intact, but not the expected file.
        reason: why the file failed its check.
    """
    return _instead(cached, Action.REPLACE if is_damaged else Action.DOWNLOAD, reason)


def may_publish(request: FetchRequest, cached: Cached) -> bool:
    """Return whether a download may replace the entry's file."""
    if cached.status is None:
        return True
    is_own = cached.record is not None and (cached.is_of_one_url or _is_owner(request, cached.record))
    return is_own and cached.is_replaceable


def known_digest(request: FetchRequest, cached: Cached) -> str | None:
    """Return the digits with which the cached file's digest must start, from the strongest source; None if unknown."""
    recorded = cached.record.sha256 if cached.record else None
    return request.sha256 or recorded or request.hash_prefix


def _instead(cached: Cached, action: Action, reason: str) -> Decision:
    """Return the action for an unusable file if the file may be replaced; else leave the file alone."""
    if cached.is_replaceable:
        return Decision(action, reason)
    return Decision(Action.SEPARATE, f"{reason}, and rankload did not put it there")


def _is_owner(request: FetchRequest, record: Record) -> bool:
    is_same_content = request.sha256 is not None and request.sha256 == record.sha256
    return is_same_content or record.url_key in (url.key for url in request.urls)
