"""Fetch a file once per domain, and give every rank the file or the error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_read_errors
from rankload._coordination.call_context import CallContext
from rankload._coordination.channel import Channel
from rankload._fetch.cache_domain import Domain, find_domain
from rankload._fetch.index_files import files_of
from rankload._fetch.leader import fetch
from rankload._fetch.models import FetchRequest
from rankload._fetch.replicas import is_known, offer_version, same_version
from rankload._platform.host import kernel_id
from rankload._platform.linux import is_on_local_disk
from rankload._settings import Settings
from rankload._types import FetchedFile, FileIdentity, Progress, Report
from rankload.errors import CacheError

if TYPE_CHECKING:
    from rankload._fetch.exchange.peers import Peers

_logger = logging.getLogger("rankload")


def fetch_once(request: FetchRequest, call: CallContext) -> FetchedFile:
    """Return the verified file as this rank sees it. Collective over the channel's ranks.

    Only the leader of a domain consults the cache: another node's view of a network filesystem may be stale.

    Raises:
        RankloadError: the first failure of any rank.
    """
    domain = _domain_for(request, call.channel)
    is_exchanged = _exchanges(request, domain, call)
    if is_exchanged:
        call.channel.contribute("leaders", str(domain.leader) if domain.is_leader else None)
    if not domain.is_leader:
        return _wait_for_leader(domain, request, call)
    peers = _peers(request, call) if is_exchanged else None
    file = _identified(fetch(request, call.report, call.settings, peers))
    file = replace(file, reason=_reason(file, request, domain.leader, peers))
    if file.source == "download":
        _logger.info("%s: %s", request.url, file.reason)
    if file.source != "local" and request.sha256 is None:
        if call.channel.identity.rank == 0:
            offer_version(file, call.channel)
        else:
            first = call.channel.wait_for(f"fetched/{domain.key_of_rank_0}", from_rank=0)
            file = _identified(same_version(file, first, request, call))
    assert file.identity is not None
    call.channel.post(
        f"fetched/{domain.key}",
        {
            "path": os.path.relpath(file.path, request.directory) if file.source != "local" else str(file.path),
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
            "parts_sha256": file.parts_sha256,
            "is_known": is_known(file),
            "source": file.source,
            "reason": file.reason,
            "is_published": file.is_published,
            "part_sizes": file.part_sizes,
            "identity": asdict(file.identity),
            "kernel": kernel_id(),
        },
    )
    return file


def fetch_at(rank: int, request: FetchRequest, call: CallContext) -> FetchedFile | None:
    """Let one rank fetch for itself. Collective: the other ranks wait until that rank has the file.

    Returns:
        The file on that rank; None on the others.

    Raises:
        RankloadError: the first failure of any rank.
    """
    if call.channel.identity.rank != rank:
        call.channel.wait_for("fetched at the source", from_rank=rank)
        return None
    if request.url.local_path is None:
        make_directory(request.directory)
    file = fetch(request, call.report, call.settings)
    file = replace(file, reason=_reason(file, request, rank, None))
    call.channel.post("fetched at the source", {})
    return file


def _exchanges(request: FetchRequest, domain: Domain, call: CallContext) -> bool:
    """Return whether nodes that share no directory fetch the file together. The same on all ranks."""
    if request.url.local_path is not None or call.identity.world_size == 1:
        return False
    return request.scope == "exchange" or (request.scope == "auto" and domain.is_node_local)


def _peers(request: FetchRequest, call: CallContext) -> Peers | None:
    """Return the leaders of all domains, if there are several."""
    leaders = sorted(map(int, call.channel.contributions("leaders")))
    if len(leaders) == 1:
        return None
    from rankload._fetch.exchange.peers import Peers  # imports what only a miss needs

    return Peers(leaders, call, is_required=request.scope == "exchange")


def _reason(file: FetchedFile, request: FetchRequest, leader: int, peers: Peers | None) -> str:
    """Return how a leader got the file, and why in that way."""
    if file.source == "local":
        return "a local file, used in place"
    if peers is not None and peers.received_bytes:
        size_bytes = file.size_bytes + sum(file.part_sizes)
        why = "it was asked for" if peers.is_required else "each has a cache of its own"
        return f"exchanged by nodes, since {why}: {peers.received_bytes} of {size_bytes} bytes came from other nodes"
    if file.source != "download":
        return "in the cache"
    if peers is not None and not peers.is_connected:
        return "downloaded for this node alone: the nodes have caches of their own, and cannot connect to one another"
    if peers is not None:
        return f"downloaded by rank {leader}, since no other node could send the file"
    whom = {"process": "itself", "node": "its node"}.get(request.scope, "all ranks that share its cache")
    return f"downloaded by rank {leader} for {whom}"


def _domain_for(request: FetchRequest, channel: Channel) -> Domain:
    if request.url.local_path is not None:
        # rank 0 checks a file that is used in place; the ranks of a node without that file report its absence
        return find_domain(channel, "job", request.directory)
    make_directory(request.directory)
    return find_domain(channel, "auto" if request.scope == "exchange" else request.scope, request.directory)


def _identified(file: FetchedFile) -> FetchedFile:
    """Return the file with its identity, by which a load recognises it."""
    if file.identity is not None:
        return file
    with wrap_read_errors(file.path):
        return replace(file, identity=FileIdentity.of(file.path.stat()))


def _wait_for_leader(domain: Domain, request: FetchRequest, call: CallContext) -> FetchedFile:
    fetched = call.channel.wait_for(f"fetched/{domain.key}", from_rank=domain.leader)
    path = request.directory / fetched["path"]  # an absolute path stays as it is
    file = FetchedFile(
        path,
        fetched["size_bytes"],
        fetched["sha256"],
        fetched["source"],
        fetched["is_published"],
        tuple(fetched["part_sizes"]),
        fetched["parts_sha256"],
        reason=fetched["reason"],
    )
    published = FileIdentity(**fetched["identity"])
    is_here = fetched["kernel"] == kernel_id()

    def is_it(found: FileIdentity, is_local: bool) -> bool:
        if file.source == "local":  # each node has its own file: only the size must be the same
            return found.size_bytes == file.size_bytes
        return found.is_same(published, is_exact=is_here and is_local)

    found, is_visible = _await_visible(path, is_it, call.report, call.settings)
    if found is not None and is_visible:
        _await_parts(file, domain, call.report, call.settings)
        return replace(file, identity=found)
    if found is None:
        seen = "does not exist"
    elif found.size_bytes != file.size_bytes:
        seen = f"has {found.size_bytes} bytes, not {file.size_bytes},"
    else:
        seen = "is another file (another job may have replaced it)"
    error = CacheError(
        f"rank {domain.leader} published {path}, but it {seen} here after {call.settings.visibility_seconds:g} s: is "
        "the directory shared between these nodes? Pass scope='node', or a model_dir that is the same everywhere",
        path=str(path),
    )
    # another rank or job may have fetched the file anew: the digest will show whether the bytes are the same
    is_renewed = found is not None and found.size_bytes == file.size_bytes and file.sha256 is not None
    # with scope="job" the caller asserts a shared directory: if that is wrong, a thousand nodes must not ask the origin
    is_elsewhere = found is None and (request.scope == "job" or request.offline)
    if file.source == "local" or is_elsewhere or (found is not None and not is_renewed):
        raise error
    if found is None:
        _logger.warning("%s was removed after rank %d published it; fetching it once more", path, domain.leader)
    return _fetch_again(file, request, call, error)


def _await_parts(file: FetchedFile, domain: Domain, report: Report, settings: Settings) -> None:
    for path, size_bytes in files_of(file)[1:]:
        found, is_visible = _await_visible(path, partial(_has_size, size_bytes), report, settings)
        if not is_visible:
            raise CacheError(
                f"rank {domain.leader} published {path}, a part of {file.path.name}, with {size_bytes} bytes; after "
                f"{settings.visibility_seconds:g} s there are {found.size_bytes if found else 'none'} here",
                path=str(path),
            )


def _has_size(size_bytes: int, found: FileIdentity, is_local: bool) -> bool:
    return found.size_bytes == size_bytes


def _fetch_again(file: FetchedFile, request: FetchRequest, call: CallContext, error: CacheError) -> FetchedFile:
    """Fetch the leader's file again after its removal: exactly the same bytes, or none.

    Every rank that misses the file calls this independently, like another job. The lease makes that one download.
    """
    again = fetch(replace(request, sha256=file.sha256 or request.sha256), call.report, call.settings)
    if again.size_bytes != file.size_bytes:
        raise error
    return again


def _await_visible(
    path: Path, is_it: Callable[[FileIdentity, bool], bool], report: Report, settings: Settings
) -> tuple[FileIdentity | None, bool]:
    """Wait until this node sees the file that the leader published on another.

    Linux NFS clients keep absent names and old sizes for up to 60 s; opening a file revalidates them sooner than
    stat(), and listing the directory drops absent names (nfs(5), "Data and metadata coherence").

    Args:
        path: path at which the file will appear.
        is_it: returns whether a file is the published one, from its identity, and whether it is on a local disk, where
            nothing lags.
        report: called with this rank's progress.
        settings: deadlines.

    Returns:
        The identity of the file at the path, None without a file; and whether that is the published file.
    """
    deadline, delay = time.monotonic() + settings.visibility_seconds, 0.01
    while True:
        found, is_local = _identity_when_opened(path)
        is_visible = found is not None and is_it(found, is_local)
        if is_visible or (found is not None and is_local) or time.monotonic() >= deadline:
            return found, is_visible
        report(Progress("waiting"))  # raises if another rank has failed
        time.sleep(delay)
        delay = min(delay * 1.5, 1.0)


def _identity_when_opened(path: Path) -> tuple[FileIdentity | None, bool]:
    """Return a file's identity, None without a file; and whether the file is on a local disk."""
    try:
        # O_NONBLOCK: another user may have put a pipe there, and open(2) would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return FileIdentity.of(os.fstat(descriptor)), is_on_local_disk(descriptor)
        finally:
            os.close(descriptor)
    except PermissionError as error:  # the file exists, and waiting does not make it readable
        raise CacheError(f"cannot read {path}: {error.strerror}", path=str(path), errno=error.errno) from error
    except OSError:
        with suppress(OSError):
            list(path.parent.iterdir())
        return None, False
