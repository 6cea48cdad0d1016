"""Who fetches, who waits: one fetch for every domain, and its result or its error on every rank."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rankload._cache.directory import make_directory
from rankload._errors import CacheError
from rankload._fetch.leader import fetch
from rankload._fetch.parts import files_of
from rankload._job.domains import Domain, find_domain
from rankload._settings import Settings
from rankload._types import Channel, FetchedFile, FetchRequest, Progress, Report
from rankload._urls import local_path_of

_logger = logging.getLogger("rankload")


def fetch_once(request: FetchRequest, channel: Channel, settings: Settings) -> FetchedFile:
    """Return the verified file as this rank sees it. Collective over the channel's ranks.

    Only the leader of a domain consults the cache: another node's view of a network filesystem may be stale.

    Raises:
        RankloadError: the first cause, from whichever rank.
    """
    domain = _domain_for(request, channel)
    if not domain.is_leader:
        return _wait_for_leader(domain, request, channel, settings)
    file = fetch(request, channel.report, settings)
    channel.post(
        f"fetched/{domain.key}",
        {
            "path": os.path.relpath(file.path, request.directory) if file.source != "local" else str(file.path),
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
            "source": file.source,
            "is_published": file.is_published,
            "part_sizes": file.part_sizes,
        },
    )
    return file


def fetch_at(rank: int, request: FetchRequest, channel: Channel, settings: Settings) -> FetchedFile | None:
    """Let one rank fetch, for itself; return its file there, and None on the others, when it has it. Collective.

    Raises:
        RankloadError: the first cause, from whichever rank.
    """
    if channel.identity.rank != rank:
        channel.wait_for("fetched at the source", from_rank=rank)
        return None
    if local_path_of(request.urls[0]) is None:
        make_directory(request.directory)
    file = fetch(request, channel.report, settings)
    channel.post("fetched at the source", {})
    return file


def _domain_for(request: FetchRequest, channel: Channel) -> Domain:
    if local_path_of(request.urls[0]) is not None:
        # a file used in place is rank 0's to check; where another node has none at that path, its ranks say so
        return find_domain(channel, "job", request.directory)
    make_directory(request.directory)
    return find_domain(channel, request.scope, request.directory)


def _wait_for_leader(domain: Domain, request: FetchRequest, channel: Channel, settings: Settings) -> FetchedFile:
    fetched = channel.wait_for(f"fetched/{domain.key}", from_rank=domain.leader)
    path = request.directory / fetched["path"]  # an absolute path stays as it is
    file = FetchedFile(
        path,
        fetched["size_bytes"],
        fetched["sha256"],
        fetched["source"],
        fetched["is_published"],
        tuple(fetched["part_sizes"]),
    )
    found = _await_visible(path, file.size_bytes, channel.report, settings)
    if found == file.size_bytes:
        _await_parts(file, domain, channel.report, settings)
        return file
    seen = "does not exist" if found is None else f"has {found} bytes, not {file.size_bytes},"
    error = CacheError(
        f"rank {domain.leader} published {path}, but it {seen} here after {settings.visibility_seconds:g} s: is the "
        "directory shared between these nodes? Pass scope='node', or a model_dir that is the same everywhere",
        path=str(path),
    )
    # scope="job" is the caller's word that it is shared: a thousand nodes where it is not must not all ask the origin
    if found is not None or file.source == "local" or request.scope == "job" or request.offline:
        raise error
    _logger.warning("%s has been removed since rank %d published it; fetching it once more", path, domain.leader)
    return _fetch_again(file, request, channel, settings, error)


def _await_parts(file: FetchedFile, domain: Domain, report: Report, settings: Settings) -> None:
    for path, size_bytes in files_of(file)[1:]:
        if (found := _await_visible(path, size_bytes, report, settings)) != size_bytes:
            raise CacheError(
                f"rank {domain.leader} published {path}, a part of {file.path.name}, with {size_bytes} bytes; after "
                f"{settings.visibility_seconds:g} s there are {found or 'none'} here",
                path=str(path),
            )


def _fetch_again(
    file: FetchedFile, request: FetchRequest, channel: Channel, settings: Settings, error: CacheError
) -> FetchedFile:
    """Fetch what the leader had, though somebody has deleted it: the very same bytes, or nothing.

    Every rank that misses the file comes here by itself, as if it were another job: the lease makes it one download.
    """
    again = fetch(replace(request, sha256=file.sha256 or request.sha256), channel.report, settings)
    if again.size_bytes != file.size_bytes:
        raise error
    return again


def _await_visible(path: Path, size_bytes: int, report: Report, settings: Settings) -> int | None:
    """Wait until this node sees the file that the leader published on another; return its size, None for no file.

    Linux NFS clients keep absent names and old sizes for up to 60 s; opening a file revalidates them sooner than
    stat(), and listing the directory drops absent names (nfs(5), "Data and metadata coherence").
    """
    deadline, delay = time.monotonic() + settings.visibility_seconds, 0.01
    while (found := _size_when_opened(path)) != size_bytes and time.monotonic() < deadline:
        report(Progress("waiting"))  # raises what another rank has failed with
        time.sleep(delay)
        delay = min(delay * 1.5, 1.0)
    return found


def _size_when_opened(path: Path) -> int | None:
    try:
        # not waiting for the writer of a pipe that somebody has put there
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except PermissionError as error:  # it is there, and will not be ours to read by waiting
        raise CacheError(f"cannot read {path}: {error.strerror}", path=str(path), errno=error.errno) from error
    except OSError:
        with suppress(OSError):
            list(path.parent.iterdir())
        return None
