"""Unvouched files: a file in the cache with the right name, but without record or digest, for example torch.hub's.

Many files are called ``weights.pth``. So the origin is asked once before such a file is used for a URL.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing
from dataclasses import dataclass, replace

from rankload._cache.files import wrap_read_errors
from rankload._fetch.bounded_read import Answer, read_bounded
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.origin import UnusableRange
from rankload._fetch.origins.registry import origin_for
from rankload._formats.source import open_regular
from rankload._settings import Settings
from rankload._types import FetchedFile, Progress, Report
from rankload.errors import ContentChangedError, FetchError

_logger = logging.getLogger("rankload")

#: Bytes to compare, in the middle of the file: models of one architecture have the same length, but differ there.
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class Opinion:
    """An origin's opinion of an unvouched file.

    Attributes:
        agrees: whether the file is the origin's; None if the origin could not be asked, or gave too few facts.
        reason: reason for that, for messages.
        etag: validator of the origin.
        sha256: digest of the file, if the origin gave one to compare with.
        vouched_by: source of the origin's digest.
    """

    agrees: bool | None
    reason: str
    etag: str | None = None
    sha256: str | None = None
    vouched_by: str | None = None


def ask_origin(file: FetchedFile, request: FetchRequest, report: Report, settings: Settings) -> Opinion:
    """Ask the first of a request's URLs that answers, by one small request, whether a file is the URL's.

    The file's length, a piece of its content and, if the origin gives one, its digest are compared.

    Raises:
        CacheError: the file cannot be read.
        RankloadError: any error of ``report``.
    """
    if request.offline:
        return Opinion(None, "offline")
    middle = max(0, (file.size_bytes - _SAMPLE_BYTES) // 2)
    reason = ""
    for url in request.urls:
        with closing(origin_for(url, headers_of(request, url), settings)) as origin:
            try:
                answer = read_bounded(
                    origin, middle, min(middle + _SAMPLE_BYTES, file.size_bytes), None, most_bytes=_SAMPLE_BYTES,
                    settings=replace(settings, retries=0), report=report,
                )  # fmt: skip
            except ContentChangedError:  # the origin's file ends before the range begins
                return Opinion(False, f"{origin.display_name} is shorter")
            except (FetchError, UnusableRange) as error:
                reason = str(error)
                continue
            with wrap_read_errors(file.path):
                return _judged(file, answer, 0 if answer.is_whole else middle, origin.display_name, report)
    return Opinion(None, reason)


def _judged(file: FetchedFile, answer: Answer, begin: int, display_name: str, report: Report) -> Opinion:
    version = answer.version
    if version.size_bytes not in (None, file.size_bytes):
        return Opinion(False, f"{display_name} has {version.size_bytes} bytes, but this file has {file.size_bytes}")
    with open_regular(file.path) as local:
        if os.pread(local.fileno(), len(answer.content), begin) != answer.content:
            return Opinion(False, f"{display_name} has other content")
    if (claim := version.claim) is None:
        if version.size_bytes is None:
            return Opinion(
                None, "the origin gives neither its length nor a digest; a piece of it is equal", version.etag
            )
        return Opinion(True, "length and a piece of the content equal the origin's", version.etag)
    report(Progress("hashing", 0, file.size_bytes))
    sha256 = sha256_of_file(file.path, lambda done: report(Progress("hashing", done, file.size_bytes)))
    if not sha256.startswith(claim.sha256):
        return Opinion(False, f"{display_name} has another digest ({claim.source})")
    return Opinion(True, "its digest equals the origin's", version.etag, sha256, claim.source)
