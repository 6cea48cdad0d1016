"""What the leader of a domain does: cache hit? else lease → download."""

from __future__ import annotations

import json
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from rankload._cache.directory import make_directory
from rankload._cache.failures import reading
from rankload._cache.layout import Entry, file_name_of, local_path_of, redact, url_key
from rankload._cache.lease import hold_lease
from rankload._cache.record import Record, read_record, write_record
from rankload._checkpoint.open import check_structure
from rankload._errors import CacheError, OfflineError, RankloadError, VerificationError
from rankload._fetch.digest import sha256_of_file
from rankload._fetch.download import download
from rankload._fetch.partial import remove_dead_partials, sizes_of_partials
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
    while True:
        look = _look(entry, request, report)
        if look.file is not None:
            return look.file
        entry = look.entry
        if request.offline:
            raise _offline_error(entry, request)
        if (file := _download_under_lease(look, request, report, settings)) is not None:
            return file


@dataclass(frozen=True)
class _Look:
    """What a look into the cache has found.

    Attributes:
        entry: the one that is the request's.
        version: of the file that was there, None for none: it changes when somebody publishes.
        file: that file, if it can be used.
    """

    entry: Entry
    version: tuple[int, int] | None
    file: FetchedFile | None


def _download_under_lease(look: _Look, request: FetchRequest, report: Report, settings: Settings) -> FetchedFile | None:
    """Download, or return None because another job has published since the look."""
    entry = look.entry

    def has_changed() -> bool:
        report(Progress("waiting"))
        return _version(entry) != look.version

    with hold_lease(
        entry.lease_path, settings, progress_mark=lambda: sizes_of_partials(entry), on_wait=has_changed
    ) as is_held:
        if _version(entry) != look.version:
            return None
        if is_held:
            remove_dead_partials(entry)
        return download(request, entry, report, settings)


def _version(entry: Entry) -> tuple[int, int] | None:
    try:
        return _version_of(entry.path.stat())
    except OSError:
        return None


def _version_of(status: os.stat_result | None) -> tuple[int, int] | None:
    return None if status is None else (status.st_ino, status.st_mtime_ns)


def _look(entry: Entry, request: FetchRequest, report: Report) -> _Look:
    """Find the entry that is the request's, and whether its file can be used."""
    cached = _inspect(entry)
    plan = decide(request, cached)
    _logger.debug("%s: %s (%s)", entry.path, plan.action.name, plan.reason)
    if plan.action is Action.SEPARATE:
        separate = entry.separate(request.urls[0])
        _logger.warning("%s: %s; keeping %s at %s", entry.path, plan.reason, redact(request.urls[0]), separate.path)
        make_directory(separate.path.parent)
        return _look(separate, request, report)
    file = None
    if plan.action is Action.USE:
        assert cached.status is not None
        sha256 = cached.record.sha256 if cached.record else None
        file = FetchedFile(entry.path, cached.status.st_size, sha256, "cache")
    elif plan.action is Action.CHECK:
        file = _checked(entry, cached, request, report)
    elif cached.status is not None:
        _logger.warning("%s: %s; fetching it again", entry.path, plan.reason)
    return _Look(entry, _version_of(cached.status), file)


def _inspect(entry: Entry) -> Cached:
    with reading(entry.path):
        try:
            status = entry.path.stat()
        except FileNotFoundError:
            return Cached(None, None)
    if not S_ISREG(status.st_mode):
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
    except RankloadError as error:
        if not isinstance(error, VerificationError):
            raise
        _logger.warning("%s; fetching it again", error)
        return None
    except OSError as error:  # removed since the look, or the disk cannot read it any more: a new copy helps
        _logger.warning("cannot read %s: %s; fetching it again", entry.path, error.strerror or error)
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
    with reading(path):
        status = path.stat()
        if not S_ISREG(status.st_mode):  # opening a pipe would wait for its writer, for ever
            raise CacheError(f"cannot read {path}: it is no regular file", path=str(path))
        check_structure(path, must_be_checkpoint=request.must_be_checkpoint, origin=str(path))
        sha256 = None
        if vouching_digest(request):
            sha256 = _hash(path, status.st_size, report)
            check_digest(sha256, request, str(path))
    return FetchedFile(path, status.st_size, sha256, "local")


def _hash(path: Path, size_bytes: int, report: Report) -> str:
    report(Progress("hashing", 0, size_bytes))
    return sha256_of_file(path, lambda done: report(Progress("hashing", done, size_bytes)))


def _offline_error(entry: Entry, request: FetchRequest) -> OfflineError:
    url = redact(request.urls[0])
    arguments = [json.dumps(url), f"model_dir={json.dumps(str(request.directory))}"]
    if request.file_name != file_name_of(request.urls[0]):
        arguments.append(f"file_name={json.dumps(request.file_name)}")
    command = f"from rankload import dist_fetch; dist_fetch({', '.join(arguments)})"
    secrets = [what for what, is_used in (("query", url != request.urls[0]), ("headers", request.headers)) if is_used]
    advice = f" (with the {' and '.join(secrets)} of this call)" if secrets else ""
    return OfflineError(
        f"{entry.path} is not in the cache, and offline mode forbids fetching {url}. On a node with internet access, "
        f"run{advice}: python -c {shlex.quote(command)}",
        url=url,
        path=str(entry.path),
    )
