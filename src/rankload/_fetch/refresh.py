"""Check whether a cached file is still the one at its URL, by one conditional request, if the caller requires it."""

from __future__ import annotations

from contextlib import closing

from rankload._cache.record import Record
from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.origin import Claim, NotModified, UnusableRange, Version
from rankload._fetch.origins.registry import origin_for
from rankload._settings import Settings
from rankload._types import Report
from rankload.errors import FetchError


def is_current(record: Record, request: FetchRequest, report: Report, settings: Settings) -> bool:
    """Ask a cached file's origin whether the file is still current.

    The request carries ``If-None-Match`` or ``If-Modified-Since``, and asks for one byte. If the origin sends the file
    nevertheless, length, validators and digest of the response are compared with the record's.

    Raises:
        FetchError: no URL answered; the last URL's error.
        RankloadError: any error of ``report``.
    """
    claim = Claim(record.sha256, "its record") if record.sha256 else None
    known = Version(record.size_bytes, record.etag, record.last_modified, claim)
    failure: FetchError | None = None
    for url in sorted(request.urls, key=lambda url: url.key != record.url_key):  # mirrors have other validators
        with closing(origin_for(url, headers_of(request, url), settings)) as origin:
            try:
                answer = read_bounded(origin, 0, 1, None, most_bytes=1, unless=known, settings=settings, report=report)
            except NotModified:
                return True
            except UnusableRange as error:
                failure = FetchError(str(error), url=origin.display_name)
            except FetchError as error:
                failure = error
            else:
                return known.is_same_as(answer.version)
    assert failure is not None
    raise failure
