"""Handle a cache miss: the digest in a sidecar, the lease, the download."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rankload._cache.lease import hold_lease
from rankload._fetch.download import download
from rankload._fetch.lookup import CacheLookup, file_version, set_damaged_file_aside
from rankload._fetch.mirrors import Received
from rankload._fetch.models import FetchRequest
from rankload._fetch.offline import offline_error
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.partials.partial import Partial, SupersededError
from rankload._fetch.partials.resume import progress_of_partials
from rankload._fetch.sidecar import fetch_sidecar
from rankload._settings import Settings
from rankload._types import FetchedFile, Progress, Report
from rankload.errors import FetchError

if TYPE_CHECKING:
    from rankload._fetch.exchange.peers import Share

_logger = logging.getLogger("rankload")

__all__ = ["SupersededError", "download_under_lease", "with_sidecar"]


def download_under_lease(
    lookup: CacheLookup, request: FetchRequest, report: Report, settings: Settings, share: Share | None = None
) -> FetchedFile | None:
    """Download under the lease.

    Args:
        lookup: result of the lookup.
        request: request for the file. If its sidecar is still unknown, only other nodes may send the file.
        report: called with the progress.
        settings: deadlines and sizes.
        share: this node's part in a download of several nodes. While another job has the lease, it stays out.

    Returns:
        The file; None if another job has published since the lookup, or if the sidecar must be asked for again.

    Raises:
        SupersededError: another process took this one for dead, or took the file's name (see `download`).
        RankloadError: the file cannot be downloaded.
    """
    entry = lookup.entry

    def has_changed() -> bool:
        report(Progress("waiting"))
        return file_version(entry) != lookup.version

    def check_is_online() -> None:
        if request.offline:
            raise offline_error(entry, request, lookup.reason if lookup.version else "")

    def receive(into: Partial) -> Received | None:
        received = share.receive(into, request) if share is not None else None
        if received is None:
            check_is_online()
            if request.needs_sidecar:
                raise _NeedsSidecarError
        elif request.needs_sidecar and (received.version.claim is None or received.version.claim.source != "sidecar"):
            raise FetchError(
                f"{request.url}: sidecar=True, but this node cannot ask for the sidecar, and the nodes that have the "
                "file have not compared it with the sidecar either",
                url=request.url.display_name,
            )
        return received

    with ExitStack() as stack, suppress(_NeedsSidecarError):

        def hold(on_wait: Callable[[], bool]) -> bool:
            mark = partial(progress_of_partials, entry)
            return stack.enter_context(hold_lease(entry.lease_path, settings, progress_mark=mark, on_wait=on_wait))

        if share is None or not hold(lambda: True):
            if share is not None:
                share.stay_out()
            check_is_online()
            hold(has_changed)
        if file_version(entry) == lookup.version:
            set_damaged_file_aside(lookup)
            return download(request, entry, report, settings, receive)
    return None


def with_sidecar(request: FetchRequest, report: Report, settings: Settings, share: Share | None = None) -> FetchRequest:
    """Return the request with the digest from the first URL that has a sidecar.

    Before its part in a download of several nodes, a node asks only once: another node may have the digest. Without an
    answer, the request is returned as it is.

    Raises:
        FetchError: no URL has a usable sidecar; the last URL's error.
    """
    may_do_without = share is not None and not share.has_begun
    if may_do_without:
        settings = replace(settings, retries=0)
    for url in request.urls:
        try:
            claim = fetch_sidecar(url, headers_of(request, url), report, settings)
        except FetchError as error:
            if error.is_from_another_rank or (url == request.urls[-1] and not may_do_without):
                raise
            what = "another node may have the digest" if url == request.urls[-1] else "trying the next mirror's sidecar"
            _logger.warning("%s; %s", error, what)
        else:
            return replace(request, sha256=claim.sha256, sha256_source=claim.source)
    return request


class _NeedsSidecarError(Exception):
    """No other node sends the file, and this one has not got the sidecar yet."""
