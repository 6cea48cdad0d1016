"""One download: stream → partial file ∥ SHA-256 → verified → published, with its record."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from rankload._cache.layout import Entry, redact, url_key
from rankload._cache.record import Record, write_record
from rankload._checkpoint.open import check_structure
from rankload._errors import FetchError, TruncatedError, VerificationError
from rankload._fetch.digest import DigestThread
from rankload._fetch.http import Body, get
from rankload._fetch.partial import Partial, cache_error
from rankload._fetch.verify import check_digest, vouching_digest
from rankload._fetch.writeback import Writeback
from rankload._settings import Settings
from rankload._types import FetchedFile, FetchRequest, Progress, Report

_logger = logging.getLogger("rankload")

#: One read from the socket. The kernel seldom has more ready; a larger buffer is only allocated in vain.
_READ_BYTES = 512 << 10

#: How often others are told of the bytes; their own look comes every heartbeat.
_REPORT_SECONDS = 0.2


def download(request: FetchRequest, entry: Entry, report: Report, settings: Settings) -> FetchedFile:
    """Download from the first URL that works, verify, publish and record.

    Raises:
        FetchError: no URL gave the bytes; the error is the last one's.
        VerificationError: the bytes are not what they should be. Nothing was published.
        CacheError: the directory cannot be written.
    """
    for attempt, url in enumerate(request.urls, start=1):
        try:
            published = download_and_publish(url, request, entry, report, settings, attempt)
        except (FetchError, VerificationError) as error:
            if attempt == len(request.urls):
                raise
            _logger.warning("%s; trying the next mirror", error)
        else:
            write_record(entry.record_path, published)
            return FetchedFile(entry.path, published.size_bytes, published.sha256, "download")
    raise AssertionError("a request has at least one URL")


def download_and_publish(
    url: str, request: FetchRequest, entry: Entry, report: Report, settings: Settings, attempt: int = 1
) -> Record:
    """Download from one URL, verify and publish; return the record to be written."""
    report(Progress("connecting", attempt=attempt))
    with get(url, request.headers, settings) as body, Partial(entry) as partial:
        _logger.info('Downloading: "%s" to %s', body.url, entry.path)
        _check_space(body, entry)
        size_bytes, sha256 = _receive(body, partial, request, attempt, report)
        report(Progress("publishing", size_bytes, body.size_bytes, attempt))
        _verify(body, partial, size_bytes, sha256, request)
        partial.sync()
        status = partial.publish()
    return Record(
        url=redact(url),
        url_key=url_key(url),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        etag=body.etag,
        sha256=sha256,
        vouched_by=vouching_digest(request),
        source="download",
    )


def _receive(body: Body, partial: Partial, request: FetchRequest, attempt: int, report: Report) -> tuple[int, str]:
    """Write the body to the partial file and hash it on the way; return its length and digest."""
    digest, writeback = DigestThread(), Writeback(partial.descriptor)
    done, reported_at = 0, 0.0
    try:
        with _progress_bar(body, request) as bar:
            while piece := body.read(_READ_BYTES):
                digest.update(piece)
                _write(partial, piece, body.size_bytes)
                done += len(piece)
                writeback.advance(done)
                bar.update(len(piece))
                if (now := time.monotonic()) - reported_at > _REPORT_SECONDS:
                    reported_at = now
                    report(Progress("downloading", done, body.size_bytes, attempt))
    finally:
        sha256 = digest.finish()
    return done, sha256


def _write(partial: Partial, piece: bytes, needed_bytes: int | None) -> None:
    view = memoryview(piece)
    try:
        while view:  # write(2) may take less than it is given, on a nearly full disk for one
            view = view[os.write(partial.descriptor, view) :]
    except OSError as error:
        raise cache_error(partial.path, error, needed_bytes) from error


def _verify(body: Body, partial: Partial, size_bytes: int, sha256: str, request: FetchRequest) -> None:
    """Check length, structure and digest of a complete partial file."""
    if body.size_bytes is not None and size_bytes != body.size_bytes:
        raise TruncatedError(
            f"{body.url}: the body has {size_bytes} bytes, but {body.size_bytes} were promised; nothing was kept",
            url=body.url,
            expected=body.size_bytes,
            got=size_bytes,
        )
    if request.must_be_checkpoint or body.content_type != "text/html":
        check_structure(partial.path, must_be_checkpoint=request.must_be_checkpoint, origin=body.url)
    check_digest(sha256, request, body.url)


def _check_space(body: Body, entry: Entry) -> None:
    with suppress(FileNotFoundError):
        free = shutil.disk_usage(entry.path.parent).free
        if body.size_bytes is not None and free < body.size_bytes:
            raise cache_error(entry.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), body.size_bytes)


def _progress_bar(body: Body, request: FetchRequest) -> tqdm[NoReturn]:
    return tqdm(
        total=body.size_bytes,
        disable=None if request.progress else True,  # None: quiet when stderr is no terminal
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc=Path(request.file_name).name,
    )
