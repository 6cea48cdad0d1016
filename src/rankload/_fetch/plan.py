"""What to do about a request, given what lies in the cache. Pure: no I/O, so every case is a line in a test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

from rankload._cache.record import Record
from rankload._fetch.verify import satisfies
from rankload._types import FetchRequest
from rankload._urls import url_key


class Action(Enum):
    """What the leader does next."""

    USE = "use the cached file; its record vouches for it"
    CHECK = "check the cached file's structure, and its digest where one is known; then use it"
    DOWNLOAD = "download"
    REPLACE = "the cached file is damaged: set it aside and download"
    ASK = "ask the origin for the digest first"
    SEPARATE = "another URL owns this file name: use an entry of our own"


@dataclass(frozen=True)
class Cached:
    """What lies at an entry: the file's status and its record; each None where there is none."""

    status: os.stat_result | None
    record: Record | None


@dataclass(frozen=True)
class Plan:
    """An action and the reason for it, fit for a log line."""

    action: Action
    reason: str


def decide(request: FetchRequest, cached: Cached) -> Plan:
    """Return what to do about a request."""
    status, record = cached.status, cached.record
    if status is None:
        return Plan(Action.DOWNLOAD, "not cached")
    if status.st_size == 0:
        return Plan(Action.DOWNLOAD, "the cached file is empty")
    if record is None and request.verify == "sidecar" and request.sha256 is None:
        return Plan(Action.ASK, "a file without a record, and its sidecar at the origin is to vouch")
    if record is None:
        return Plan(Action.CHECK, "a file without a record, as torch.hub leaves it")
    if not _is_owner(request, record):
        return Plan(Action.SEPARATE, f"{record.url} has the same file name")
    if record.size_bytes != status.st_size:
        return Plan(Action.REPLACE, f"the cached file has {status.st_size} bytes, not {record.size_bytes}")
    if request.verify == "sidecar" and request.sha256 is None and record.vouched_by != "sidecar":
        return Plan(Action.ASK, "it was not yet compared with its sidecar at the origin")
    if request.verify == "never" and (record.sha256 is None or satisfies(record.sha256, request)):
        return Plan(Action.USE, "verify='never'")
    if request.verify == "always":
        return Plan(Action.CHECK, "verify='always'")
    if not record.vouches_for(status):
        return Plan(Action.CHECK, "the cached file was touched or copied since its record was written")
    if request.sha256_source == "sidecar" and record.vouched_by != "sidecar":
        return Plan(Action.CHECK, "its sidecar vouches for it from now on")
    if satisfies(record.sha256, request):
        return Plan(Action.USE, "its record vouches for it")
    if record.sha256 is None:
        return Plan(Action.CHECK, "a digest is expected, and nobody has hashed the cached file yet")
    return Plan(Action.DOWNLOAD, f"the cached file has digest {record.sha256[:16]}…, another one is expected")


def known_digest(request: FetchRequest, cached: Cached) -> str | None:
    """Return what the cached file's digest must start with, as far as anybody knows; the strongest first."""
    recorded = cached.record.sha256 if cached.record else None
    return request.sha256 or recorded or request.hash_prefix


def _is_owner(request: FetchRequest, record: Record) -> bool:
    is_same_content = request.sha256 is not None and request.sha256 == record.sha256
    return is_same_content or record.url_key in map(url_key, request.urls)
