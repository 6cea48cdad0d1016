"""What a cache miss needs: the digest in a sidecar, the lease, the download."""

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
    """Download, or return None because another job has published since the look.

    Raises:
        SupersededError: see `download`.
        RankloadError: it cannot be downloaded.
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
    """Learn the digest from the first URL that has a sidecar.

    Raises:
        FetchError: none has; the last one's.
    """
    for url in request.urls:
        try:
            claim = fetch_sidecar(url, headers_of(request, url), report, settings)
        except FetchError as error:
            if url == request.urls[-1]:
                raise
            _logger.warning("%s; trying the next mirror's", error)
        else:
            return replace(request, sha256=claim.sha256, sha256_source=claim.source)
    raise AssertionError("there is at least one URL")
