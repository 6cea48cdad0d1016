"""What the leader of a domain does: cache hit? else lease → download."""

from __future__ import annotations

import logging
from pathlib import Path

from rankload._cache.directory import make_directory
from rankload._cache.layout import Entry, local_path_of, redact, url_key
from rankload._cache.lease import hold_lease
from rankload._cache.record import Record, read_record, write_record
from rankload._checkpoint.open import check_structure
from rankload._errors import CacheError, OfflineError, VerificationError
from rankload._fetch.digest import sha256_of_file
from rankload._fetch.download import download
from rankload._fetch.partial import naming, remove_dead_partials, sizes_of_partials
from rankload._fetch.plan import Action, Cached, decide, known_digest
from rankload._fetch.verify import check_digest, vouching_digest
from rankload._settings import Settings
from rankload._types import FetchedFile, FetchRequest, Progress, Report

_logger = logging.getLogger("rankload")


def fetch(request: FetchRequest, report: Report, settings: Settings) -> FetchedFile:
    """Return a verified local file for the request. Not collective: the leader calls it.

    Raises:
        FetchError, VerificationError, CacheError: see there.
        RankloadError: what another rank failed with meanwhile, through ``report``.
    """
    report(Progress("looking"))
    if (local_path := local_path_of(request.urls[0])) is not None:
        return _use_in_place(local_path, request, report)
    make_directory((request.directory / request.file_name).parent)
    entry = Entry(request.directory / request.file_name)
    entry, found = _look(entry, request, report)
    if found is not None:
        return found
    if request.offline:
        raise _offline_error(entry, request)
    return _download_under_lease(entry, request, report, settings)


def _download_under_lease(entry: Entry, request: FetchRequest, report: Report, settings: Settings) -> FetchedFile:
    seen = _version(entry)

    def on_wait() -> bool:
        report(Progress("waiting"))
        return _version(entry) != seen

    with hold_lease(
        entry.lease_path, settings, progress_mark=lambda: sizes_of_partials(entry), on_wait=on_wait
    ) as is_held:
        if _version(entry) != seen:  # another job published meanwhile
            entry, found = _look(entry, request, report)
            if found is not None:
                return found
        if is_held:
            remove_dead_partials(entry)
        return download(request, entry, report, settings)


def _version(entry: Entry) -> tuple[int, int] | None:
    try:
        status = entry.path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _look(entry: Entry, request: FetchRequest, report: Report) -> tuple[Entry, FetchedFile | None]:
    """Return the entry that is the request's, and its file when that can be used."""
    cached = _inspect(entry)
    plan = decide(request, cached)
    _logger.debug("%s: %s (%s)", entry.path, plan.action.name, plan.reason)
    if plan.action is Action.SEPARATE:
        separate = entry.separate(request.urls[0])
        _logger.warning("%s: %s; keeping %s at %s", entry.path, plan.reason, redact(request.urls[0]), separate.path)
        make_directory(separate.path.parent)
        return _look(separate, request, report)
    if plan.action is Action.USE:
        assert cached.status is not None
        sha256 = cached.record.sha256 if cached.record else None
        return entry, FetchedFile(entry.path, cached.status.st_size, sha256, "cache")
    if plan.action is Action.CHECK:
        return entry, _checked(entry, cached, request, report)
    if cached.status is not None:
        _logger.warning("%s: %s; fetching it again", entry.path, plan.reason)
    return entry, None


def _inspect(entry: Entry) -> Cached:
    with naming(entry.path):
        try:
            status = entry.path.stat()
        except FileNotFoundError:
            return Cached(None, None)
    if not entry.path.is_file():
        raise CacheError(f"{entry.path} is no file; remove it or pass file_name=", path=str(entry.path))
    return Cached(status, read_record(entry.record_path))


def _checked(entry: Entry, cached: Cached, request: FetchRequest, report: Report) -> FetchedFile | None:
    """Check a file that no record vouches for; adopt it, or return None after saying what is wrong with it."""
    assert cached.status is not None
    status, record, expected = cached.status, cached.record, known_digest(request, cached)
    try:
        check_structure(entry.path, must_be_checkpoint=request.must_be_checkpoint, origin=str(entry.path))
        sha256 = _hash(entry.path, status.st_size, report) if expected else None
        if sha256 is not None:
            check_digest(sha256, request, str(entry.path))
            if expected and not sha256.startswith(expected):
                raise VerificationError(f"{entry.path} has changed since it was published")
    except VerificationError as error:
        _logger.warning("%s; fetching it again", error)
        return None
    vouched_by = vouching_digest(request) or (record.vouched_by if record else None)
    adopted = Record(
        url=record.url if record else redact(request.urls[0]),
        url_key=record.url_key if record else url_key(request.urls[0]),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        etag=record.etag if record else None,
        sha256=sha256,
        vouched_by=vouched_by,
        source=record.source if record else "adopted",
    )
    if adopted != record:
        write_record(entry.record_path, adopted)
    return FetchedFile(entry.path, status.st_size, sha256, "cache" if record else "adopted")


def _use_in_place(path: Path, request: FetchRequest, report: Report) -> FetchedFile:
    try:
        size_bytes = path.stat().st_size
        with path.open("rb"):
            pass
        check_structure(path, must_be_checkpoint=request.must_be_checkpoint, origin=str(path))
        sha256 = None
        if vouching_digest(request):
            sha256 = _hash(path, size_bytes, report)
            check_digest(sha256, request, str(path))
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror or error}", path=str(path), errno=error.errno) from error
    return FetchedFile(path, size_bytes, sha256, "local")


def _hash(path: Path, size_bytes: int, report: Report) -> str:
    report(Progress("hashing", 0, size_bytes))
    with naming(path):
        return sha256_of_file(path, lambda done: report(Progress("hashing", done, size_bytes)))


def _offline_error(entry: Entry, request: FetchRequest) -> OfflineError:
    url = redact(request.urls[0])
    prefetch = f"from rankload import dist_fetch; dist_fetch({url!r}, model_dir={str(request.directory)!r})"
    return OfflineError(
        f"{entry.path} is not in the cache, and offline mode forbids fetching {url}. On a node with internet access, "
        f'run: python -c "{prefetch}"',
        url=url,
        path=str(entry.path),
    )
