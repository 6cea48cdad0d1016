"""Replicas: if nodes have separate cache directories, all nodes load the same version of the file as rank 0.

The origin may replace the file between two downloads, or a directory may hold an older file. So the leader of each
other domain compares size and SHA-256 with rank 0's, which the download has computed. A file without a known digest,
such as one that another program left in the directory, is hashed for the comparison.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankload._cache.files import wrap_read_errors
from rankload._coordination.call_context import CallContext
from rankload._coordination.channel import Channel
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.index_files import digest_of_parts, files_of
from rankload._fetch.leader import fetch
from rankload._fetch.models import FetchRequest
from rankload._types import FetchedFile, Progress, Report
from rankload.errors import ContentChangedError, FetchError, VerificationError

_logger = logging.getLogger("rankload")

_QUESTION = "version"
_ADVICE = "pass refresh=True to get the origin's present file on all ranks, or sha256= to choose one version"


def offer_version(file: FetchedFile, channel: Channel) -> None:
    """Let other domains ask for the version of rank 0's file if its digest is not known. Called by rank 0."""
    if not is_known(file):
        channel.answer(_QUESTION, lambda: _version_of(_hashed(file, channel.report)))


def same_version(file: FetchedFile, first: dict[str, Any], request: FetchRequest, call: CallContext) -> FetchedFile:
    """Return this domain's file in rank 0's version, and fetch that version if necessary. Called by the leader.

    Args:
        file: file of this domain.
        first: facts that rank 0 has posted about its file.
        request: request that fetched both files.
        call: context of the call.

    Raises:
        ContentChangedError: rank 0's version cannot be fetched any more; the message names both versions.
    """
    theirs = first if first["is_known"] else call.channel.ask(_QUESTION, of_rank=0)
    file = _hashed(file, call.report)
    mine = _version_of(file)
    if all(mine[name] == theirs[name] for name in mine):
        return file
    difference = (
        f"{request.url}: rank 0 has one version of the file ({_describe(theirs)}), rank "
        f"{call.channel.identity.rank} on {call.channel.identity.host} another ({_describe(mine)}, {file.path})"
    )
    if mine["parts_sha256"] or theirs["parts_sha256"]:  # the digest of an index does not determine its parts
        raise ContentChangedError(f"{difference}: {_ADVICE}", path=str(file.path))
    _logger.warning("%s; fetching rank 0's", difference)
    wanted = replace(request, sha256=theirs["sha256"], sha256_source="rank 0's file", refresh=False)
    try:
        again = fetch(wanted, call.report, call.settings)
    except (FetchError, VerificationError) as error:
        raise ContentChangedError(
            f"{difference}, and rank 0's cannot be fetched any more: {_ADVICE} [{error.message}]", path=str(file.path)
        ) from error
    return replace(again, reason="fetched for this node alone: it had another version than rank 0")


def is_known(file: FetchedFile) -> bool:
    """Return whether the digests of a file and of all its parts are known."""
    return file.sha256 is not None and (not file.part_sizes or file.parts_sha256 is not None)


def _version_of(file: FetchedFile) -> dict[str, Any]:
    return {"size_bytes": file.size_bytes, "sha256": file.sha256, "parts_sha256": file.parts_sha256}


def _hashed(file: FetchedFile, report: Report) -> FetchedFile:
    """Return the file with its digest and that of its parts; hash them if necessary."""
    if is_known(file):
        return file
    digests = [_hash(path, size_bytes, report) for path, size_bytes in files_of(file)]
    return replace(file, sha256=digests[0], parts_sha256=digest_of_parts(digests[1:]))


def _hash(path: Path, size_bytes: int, report: Report) -> str:
    with wrap_read_errors(path):
        return sha256_of_file(path, lambda done: report(Progress("hashing", done, size_bytes)))


def _describe(version: dict[str, Any]) -> str:
    parts = f", parts {version['parts_sha256'][:12]}…" if version["parts_sha256"] else ""
    return f"{version['size_bytes']} bytes, SHA-256 {version['sha256'][:12]}…{parts}"
