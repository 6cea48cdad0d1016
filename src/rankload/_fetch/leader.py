"""The leader of a domain: use the cached file, or download under the lease.

Modules that ask origins are imported on use: a cache hit needs neither requests nor filelock, which are slow to import.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from rankload._cache.directory import make_directory
from rankload._cache.files import check_has_scheme
from rankload._cache.layout import Entry
from rankload._cache.renewal import end_renewal, is_partly_renewed
from rankload._fetch.index_files import with_parts
from rankload._fetch.lookup import (
    CacheLookup,
    adopt,
    look_up,
    make_directories,
    reject,
    use_in_place,
)
from rankload._fetch.models import FetchRequest
from rankload._fetch.offline import offline_error
from rankload._settings import Settings
from rankload._types import FetchedFile, Progress, Report
from rankload.errors import CacheError

if TYPE_CHECKING:
    from rankload._fetch.exchange.peers import Peers, Share

_logger = logging.getLogger("rankload")

#: Age, in lease durations, after which a silent lease counts as abandoned.
_LEASES_UNTIL_ABANDONED = 10

#: How often a download may lose its partial file or its name to another process. Even once is rare: after a freeze.
_MAX_SUPERSEDED = 4


def fetch(request: FetchRequest, report: Report, settings: Settings, peers: Peers | None = None) -> FetchedFile:
    """Return a verified local file for the request. If it is an index of several files, fetch those beside it.

    Not collective: only the leader calls this. With ``peers``, collective over the leaders of the call's domains.

    Raises:
        FetchError: no URL served the file.
        VerificationError: the file failed verification.
        CacheError: the directory cannot be used.
        RankloadError: another rank failed meanwhile; ``report`` raises that rank's error.
    """

    downloaded_bytes = 0

    def fetch_one(request: FetchRequest) -> FetchedFile:
        nonlocal downloaded_bytes
        request = replace(request, downloaded_bytes=downloaded_bytes)
        share = peers.next_file() if peers is not None else None
        file = _fetch(request, report, settings, share)
        if share is not None:
            share.finish(file)
        downloaded_bytes += file.size_bytes if file.source == "download" else 0
        return file

    while True:
        index = fetch_one(request)
        entry = Entry(index.path)
        if peers is not None and request.is_index:
            peers.check_same_index(index)
        # another job may renew parts from here on
        is_asked = request.refresh or not request.is_index or is_partly_renewed(entry)
        file = with_parts(index, request, fetch_one)
        if is_asked or not is_partly_renewed(entry):
            break
        peers = None  # the other nodes do not repeat this
    if request.is_index and is_asked and not request.offline:
        end_renewal(entry)
    return file


def _fetch(request: FetchRequest, report: Report, settings: Settings, share: Share | None) -> FetchedFile:
    report(Progress("looking"))
    if request.hub_file is not None:
        from rankload._fetch.hub_cache import fetch_into_hub_cache  # imports fsspec

        return fetch_into_hub_cache(
            request, report, settings, lambda blob: _fetch(blob, report, settings, share), share
        )
    if (local_path := request.url.local_path) is not None:
        check_has_scheme(request.url.raw, local_path)
        return use_in_place(local_path, _with_sidecar_of(local_path, request), report)
    make_directory(request.directory)
    entry = Entry(request.directory / request.file_name, request.directory)
    make_directories(entry)
    superseded = 0
    while True:
        lookup = look_up(entry, request, report)
        entry = lookup.entry
        if lookup.file is not None and not lookup.is_unvouched:
            if not _is_outdated(lookup, request, report, settings):
                _tidy_up(entry, settings)
                if share is not None:
                    share.serve(lookup.file, lookup.record)
                return lookup.file
            if not lookup.is_replaceable:
                entry = reject(lookup, "its origin has another file now", request)
                continue
            _logger.info("%s: its origin has another file now; fetching that", entry.path)
            request = replace(request, is_renewal=request.is_index or request.is_part)
        elif lookup.file is not None:
            from rankload._fetch.unvouched import ask_origin

            opinion = ask_origin(lookup.file, request, report, settings)
            if opinion.agrees is False:
                entry = reject(lookup, opinion.reason, request)
                continue
            if opinion.agrees:
                adopt(lookup, request, etag=opinion.etag, sha256=opinion.sha256, vouched_by=opinion.vouched_by)
            else:
                text = "%s: nobody vouches that this is the file at %s: there is no record, and no digest (%s)"
                _logger.warning(text, entry.path, request.url, opinion.reason)
            return replace(lookup.file, sha256=opinion.sha256)
        if request.offline and share is None:  # else another node may have the file
            raise offline_error(entry, request, lookup.reason if lookup.version else "")
        # report before the first trace on disk: then a leader that is killed is known to have made the call
        report(Progress("connecting"))
        from rankload._fetch import miss

        if request.needs_sidecar and not request.offline:
            request = miss.with_sidecar(request, report, settings, share)
            if not request.needs_sidecar:
                continue  # a cached file may be the right one
        try:
            if (file := miss.download_under_lease(lookup, request, report, settings, share)) is not None:
                return file
        except miss.SupersededError:
            superseded += 1
            is_over = share is not None and share.has_failed  # the other nodes cannot go on
            if is_over or superseded > _MAX_SUPERSEDED:
                raise _disturbed(entry, superseded) from None


def _disturbed(entry: Entry, times: int) -> CacheError:
    return CacheError(
        f"{entry.path}: another process removed the partial file, or put another file in its place (downloads that "
        f"failed like this: {times}); choose a directory that no other process cleans up (model_dir=)",
        path=str(entry.path),
    )


def _is_outdated(lookup: CacheLookup, request: FetchRequest, report: Report, settings: Settings) -> bool:
    """Return whether the call requires the origin's present file, and the cached one is another.

    If only some files of a checkpoint have been renewed, every call requires the present files.

    Raises:
        OfflineError: only some files have been renewed, and the origin may not be asked.
    """
    is_mixed = (request.is_index or request.is_part) and is_partly_renewed(lookup.entry)
    if is_mixed and request.offline:
        raise offline_error(lookup.entry, request, "only some files of this checkpoint have been renewed")
    if not (request.refresh or is_mixed) or request.offline or request.sha256 is not None or lookup.record is None:
        return False
    from rankload._fetch.refresh import is_current

    return not is_current(lookup.record, request, report, settings)


def _tidy_up(entry: Entry, settings: Settings) -> None:
    """Remove the lease and partial files of a leader that was killed just after it published.

    No other leader would request that lease, since the file is cached. A living holder renews its lease three times per
    lease duration. The times are those of the file server: the holder's host may have another clock than this one.
    """
    with suppress(OSError):
        status = entry.lease_path.lstat()
        is_own = S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        abandoned_at = status.st_mtime + _LEASES_UNTIL_ABANDONED * settings.lease_seconds
        if not is_own or time.time() < abandoned_at:
            return
        with tempfile.TemporaryFile(dir=entry.lease_path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime
        if now > abandoned_at:
            from rankload._fetch.partials.resume import remove_dead_partials

            entry.lease_path.unlink()
            remove_dead_partials(entry, settings, now)


def _with_sidecar_of(path: Path, request: FetchRequest) -> FetchRequest:
    if not request.needs_sidecar:
        return request
    from rankload._fetch.sidecar import read_sidecar

    claim = read_sidecar(path)
    return replace(request, sha256=claim.sha256, sha256_source=claim.source)
