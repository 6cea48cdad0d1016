"""One download: stream → partial file ∥ SHA-256 → verified → published, with its record."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from rankload._cache.failures import no_space_error, reading
from rankload._cache.layout import Entry, redact, url_key
from rankload._cache.record import Record, write_record
from rankload._checkpoint.open import check_structure
from rankload._errors import FetchError, TruncatedError, VerificationError
from rankload._fetch.digest import DigestThread
from rankload._fetch.http import Body, get
from rankload._fetch.lookout import Lookout
from rankload._fetch.partial import Partial
from rankload._fetch.verify import check_digest, vouching_digest
from rankload._fetch.writeback import Writeback
from rankload._settings import Settings
from rankload._types import FetchedFile, FetchRequest, Progress, Report

_logger = logging.getLogger("rankload")

#: One read from the socket. The kernel seldom has more ready; a larger buffer is only allocated in vain.
_READ_BYTES = 512 << 10


def download(request: FetchRequest, entry: Entry, report: Report, settings: Settings) -> FetchedFile:
    """Download from the first URL that works, verify, publish and record.

    Raises:
        FetchError: no URL gave the bytes; the error is the last one's.
        VerificationError: the bytes are not what they should be. Nothing was published.
        CacheError: the directory cannot be written.
    """
    for attempt, url in enumerate(request.urls, start=1):
        try:
            with verified_partial(url, request, entry, report, settings, attempt) as (partial, record):
                # Before the file: whoever sees the file must find out whose it is, or would adopt it as its own.
                write_record(entry.record_path, record)
                partial.publish()
        except (FetchError, VerificationError) as error:
            if attempt == len(request.urls):
                raise
            _logger.warning("%s; trying the next mirror", error)
        else:
            return FetchedFile(entry.path, record.size_bytes, record.sha256, "download")
    raise AssertionError("a request has at least one URL")


@contextmanager
def verified_partial(
    url: str, request: FetchRequest, entry: Entry, report: Report, settings: Settings, attempt: int = 1
) -> Iterator[tuple[Partial, Record]]:
    """Download from one URL and verify; yield the finished partial file, to be published, and its record."""
    report(Progress("connecting", attempt=attempt))
    with get(url, _headers_for(url, request), settings) as body, Partial(entry, body.size_bytes) as partial:
        _logger.info('Downloading: "%s" to %s', body.url, entry.path)
        _check_space(body, entry)
        size_bytes, sha256 = _receive(body, partial, request, attempt, report)
        report(Progress("publishing", size_bytes, body.size_bytes, attempt))
        _verify(body, partial, size_bytes, sha256, request)
        status = partial.finish()
        yield (
            partial,
            Record(
                url=redact(url),
                url_key=url_key(url),
                size_bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                inode=status.st_ino,
                etag=body.etag,
                sha256=sha256,
                vouched_by=vouching_digest(request),
                source="download",
            ),
        )


def _headers_for(url: str, request: FetchRequest) -> tuple[tuple[str, str], ...]:
    """Give the caller's headers to the first URL's host alone: a token for one origin is no mirror's business."""
    return request.headers if urlsplit(url).netloc == urlsplit(request.urls[0]).netloc else ()


def _receive(body: Body, partial: Partial, request: FetchRequest, attempt: int, report: Report) -> tuple[int, str]:
    """Write the body to the partial file and hash it on the way; return its length and digest."""
    digest, writeback = DigestThread(), Writeback(partial.descriptor)
    done = 0
    try:
        with _progress_bar(body, request) as bar, Lookout(body, report, attempt) as lookout:
            while piece := body.read(_READ_BYTES):
                digest.update(piece)
                partial.write(piece)
                done += len(piece)
                writeback.advance(done)
                bar.update(len(piece))
                lookout.progress = replace(lookout.progress, bytes_done=done)
    finally:
        sha256 = digest.finish()
    return done, sha256


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
        with reading(partial.path):
            check_structure(partial.path, must_be_checkpoint=request.must_be_checkpoint, origin=body.url)
    check_digest(sha256, request, body.url)


def _check_space(body: Body, entry: Entry) -> None:
    """Fail before the first byte rather than after the last that fits."""
    with suppress(FileNotFoundError):
        disk = shutil.disk_usage(entry.path.parent)
        # some FUSE filesystems do not tell: 0 of 0 bytes are free
        if body.size_bytes is not None and disk.free < body.size_bytes and disk.total:
            raise no_space_error(entry.path, body.size_bytes, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


class _ProgressBar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """tqdm's bar, without its monitor thread: that would outlive the download, and make every later fork warn."""

    monitor_interval = 0


def _progress_bar(body: Body, request: FetchRequest) -> _ProgressBar:
    return _ProgressBar(
        total=body.size_bytes,
        disable=None if request.progress else True,  # None: quiet when stderr is no terminal
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc=Path(request.file_name).name,
    )
