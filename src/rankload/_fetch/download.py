"""One download: write a partial file while hashing it, verify it, and publish it with its record."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._cache.layout import Entry
from rankload._cache.quarantine import quarantine
from rankload._cache.record import Record, write_record
from rankload._cache.renewal import begin_renewal
from rankload._fetch.digests import check_digest, claims_of
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.index_files import check_index
from rankload._fetch.lookup import may_be_published
from rankload._fetch.mirrors import Received, Receiver
from rankload._fetch.models import FetchRequest
from rankload._fetch.partials.partial import Partial, SupersededError
from rankload._fetch.partials.resume import adopt_into, remove_dead_partials
from rankload._formats.sniff import check_structure
from rankload._platform.linux import birth_ns
from rankload._settings import Settings
from rankload._types import FetchedFile, Progress, Report
from rankload._urls import Url
from rankload.errors import DigestMismatchError, MissingFileError, VerificationError

_logger = logging.getLogger("rankload")


def download(
    request: FetchRequest,
    entry: Entry,
    report: Report,
    settings: Settings,
    receive: Callable[[Partial], Received | None] = lambda partial: None,
) -> FetchedFile:
    """Download, verify and publish a file with its record.

    Args:
        request: request for the file.
        entry: cache entry to publish to.
        report: called with the progress.
        settings: deadlines and sizes.
        receive: fills the partial file in another way than from the request's URLs, and returns None if it cannot. A
            file that came in that way and fails verification is not fetched again.

    A file that fails verification is fetched once more, from the next mirror if there is one. The second download uses
    no ranges, because an origin may serve wrong ranges.

    Raises:
        FetchError: no URL served the file; the last URL's error.
        VerificationError: the file failed verification. Nothing was published.
        CacheError: the directory cannot be written to.
        SupersededError: another process took this one for dead, or published another URL's file under this name.
    """
    urls, failures = request.urls, Counter[Url]()
    while True:
        with Partial(entry, settings, request.digest) as partial, partial.noticing_its_loss():
            from_others = None
            if not failures:
                _adopt(partial, entry, request, report, settings)
                from_others = receive(partial)
            is_again = bool(failures)
            received = from_others or Receiver(request, partial, report, settings, is_whole=is_again).receive(urls)
            try:
                vouched_by = verify(received, partial, request)
            except VerificationError as error:
                _set_aside(partial, entry, error)
                if from_others is not None:
                    raise
                failures[received.url] += 1
                urls = _next_urls(urls, received, failures, error)
                continue
            status = partial.finish(received.size_bytes)
            birth, replaced = birth_ns(partial.path), _identity(entry.path)
            if not may_be_published(entry, request):  # another file has appeared since the lookup
                raise SupersededError(str(entry.path))
            if request.is_renewal:
                with wrap_write_errors(entry.record_path):
                    begin_renewal(entry)
            # write the record first: another job that sees a file without a record would adopt it for its own URL
            record = _record(received, status, birth, vouched_by, replaced)
            _write_record(entry.record_path, record, report, settings)
            try:
                if _identity(entry.path) != replaced:  # check again: writing the record may take long
                    raise SupersededError(str(entry.path))
                partial.publish(may_replace=replaced is not None)
            except SupersededError:
                _disown(entry, record)
                raise
        remove_dead_partials(entry, settings, now=status.st_mtime)
        return FetchedFile(entry.path, received.size_bytes, received.sha256, "download", is_published=True)


def verify(received: Received, partial: Partial, request: FetchRequest) -> str | None:
    """Check structure and digest of a complete partial file.

    Returns:
        The source of the digest that vouches for the file; None without such a digest.

    Raises:
        VerificationError: the structure or the digest is wrong.
    """
    display_name = received.url.display_name
    if request.must_be_checkpoint or received.version.content_type != "text/html":
        with wrap_read_errors(partial.path):
            check_structure(partial.path, must_be_checkpoint=request.must_be_checkpoint, origin=display_name)
            check_index(partial.path, request, display_name)
    vouched_by = check_digest(received.sha256, claims_of(request, received.version.claim), display_name)
    _logger.info(
        "%s: %d bytes, SHA-256 %s (%s)",
        display_name,
        received.size_bytes,
        received.sha256,
        vouched_by or "no digest to compare with",
    )
    return vouched_by


def _write_record(path: Path, record: Record, report: Report, settings: Settings) -> None:
    """Write a record, or raise CacheError.

    On a network filesystem, a directory that another node has just made may exist for mkdir(2), but not for open(2).
    That lasts as long as this client caches the directory's absence.
    """
    deadline, delay = time.monotonic() + settings.visibility_seconds, 0.01
    while True:
        try:
            with wrap_write_errors(path):
                write_record(path, record)
            return
        except MissingFileError:
            if time.monotonic() > deadline:
                raise
        report(Progress("waiting"))
        with suppress(OSError):
            list(path.parent.parent.iterdir())  # makes an NFS client drop cached absent names
        time.sleep(delay)
        delay = min(delay * 1.5, 1.0)


def _adopt(partial: Partial, entry: Entry, request: FetchRequest, report: Report, settings: Settings) -> None:
    url_keys = frozenset(url.key for url in request.urls)

    def on_bytes(count: int) -> None:
        report(Progress("looking", count))

    adopt_into(partial, entry, url_keys, request.digest, settings, on_bytes)
    remove_dead_partials(entry, settings, now=os.fstat(partial.descriptor).st_mtime)


def _set_aside(partial: Partial, entry: Entry, error: VerificationError) -> None:
    """Quarantine a file with a wrong digest. Other wrong files are dropped: the error describes them well enough."""
    path = quarantine(entry, str(error), partial.move_to) if isinstance(error, DigestMismatchError) else None
    if path is None:
        partial.clear()
    else:
        error.message += f"; the downloaded file is kept at {path}"


def _next_urls(
    urls: tuple[Url, ...], received: Received, failures: Counter[Url], error: VerificationError
) -> tuple[Url, ...]:
    others = tuple(url for url in urls if url != received.url)
    # a wrong file that came in full, with its length, would be the same the next time
    may_be_an_accident = isinstance(error, DigestMismatchError) or received.version.size_bytes is None
    if others:
        _logger.warning("%s; trying the next mirror", error)
        # the wrong bytes of a mixed file may be another mirror's; the next time, nothing is mixed
        return (*others, received.url) if received.is_mixed else others
    if failures[received.url] > 1 or not may_be_an_accident:
        raise error
    _logger.warning("%s; fetching it once more", error)
    return urls


def _disown(entry: Entry, record: Record) -> None:
    """Make a record vouch for no URL, if a file with other bytes got the name after the record was written."""
    with suppress(OSError):
        if sha256_of_file(entry.path, lambda count: None) != record.sha256:
            write_record(entry.record_path, replace(record, url="something else", url_key="", sha256=None))


def _identity(path: Path) -> tuple[int, int | None] | None:
    """Return the inode number and time of birth of the file at a path; None if there is none."""
    try:
        return path.lstat().st_ino, birth_ns(path)
    except FileNotFoundError:
        return None


def _record(
    received: Received,
    status: os.stat_result,
    birth: int | None,
    vouched_by: str | None,
    replaced: tuple[int, int | None] | None,
) -> Record:
    return Record(
        url=received.url.display_name,
        url_key=received.url.key,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        etag=received.version.etag,
        last_modified=received.version.last_modified,
        sha256=received.sha256,
        vouched_by=vouched_by,
        source="download",
        birth_ns=birth,
        replaces_inode=replaced[0] if replaced else None,
        replaces_birth_ns=replaced[1] if replaced else None,
    )
