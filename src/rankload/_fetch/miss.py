"""Handle a cache miss: the digest in a sidecar, the lease, the download."""

from __future__ import annotations

import logging
from dataclasses import replace

from rankload._cache.lease import hold_lease
from rankload._fetch.download import download
from rankload._fetch.lookup import CacheLookup, file_version, set_damaged_file_aside
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.partials.partial import SupersededError
from rankload._fetch.partials.resume import progress_of_partials
from rankload._fetch.sidecar import fetch_sidecar
from rankload._settings import Settings
from rankload._types import FetchedFile, Progress, Report
from rankload.errors import FetchError

_logger = logging.getLogger("rankload")

__all__ = ["SupersededError", "download_under_lease", "with_sidecar"]


def download_under_lease(
    lookup: CacheLookup, request: FetchRequest, report: Report, settings: Settings
) -> FetchedFile | None:
    """Download under the lease; return None if another job has published since the lookup.

    Raises:
        SupersededError: another process took this one for dead, or took the file's name (see `download`).
        RankloadError: the file cannot be downloaded.
    """
    entry = lookup.entry

    def has_changed() -> bool:
        report(Progress("waiting"))
        return file_version(entry) != lookup.version

    with hold_lease(entry.lease_path, settings, progress_mark=lambda: progress_of_partials(entry), on_wait=has_changed):
        if file_version(entry) == lookup.version:
            set_damaged_file_aside(lookup)
            return download(request, entry, report, settings)
    return None


def with_sidecar(request: FetchRequest, report: Report, settings: Settings) -> FetchRequest:
    """Return the request with the digest from the first URL that has a sidecar.

    Raises:
        FetchError: no URL has a usable sidecar; the last URL's error.
    """
    for url in request.urls:
        try:
            claim = fetch_sidecar(url, headers_of(request, url), report, settings)
        except FetchError as error:
            if url == request.urls[-1]:
                raise
            _logger.warning("%s; trying the next mirror's sidecar", error)
        else:
            return replace(request, sha256=claim.sha256, sha256_source=claim.source)
    raise AssertionError("there is at least one URL")
