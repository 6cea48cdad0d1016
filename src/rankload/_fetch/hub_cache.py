"""Files of the Hugging Face Hub in huggingface_hub's own cache, so that nothing is stored twice.

A blob is looked up, downloaded, verified and recorded like any other file; its name is its digest. huggingface_hub
finds what is fetched here, and this module finds what huggingface_hub has fetched. Both replace blobs by rename alone.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankload._cache.access import is_trusted, open_new
from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.digests import check_digest, claims_of
from rankload._fetch.hub_layout import (
    check_links,
    commit_of,
    directory_of,
    find_cached,
    link_snapshot,
    remember_commit,
    snapshot_path_of,
)
from rankload._fetch.hub_listing import HubBlob, described_blob, is_commit, list_repository
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.registry import origin_for
from rankload._fetch.transfer.size_limit import SizeLimit
from rankload._formats.source import open_regular
from rankload._settings import Settings
from rankload._text import printable
from rankload._types import FetchedFile, Report
from rankload._urls import Url
from rankload.errors import CoordinationError, FetchError, OfflineError, VerificationError

if TYPE_CHECKING:
    from rankload._fetch.exchange.peers import Share

#: Largest content that is read into memory to compare it with git's SHA-1. The Hub keeps files of more than 10 MB in
#: Git LFS (huggingface.co/docs/hub/repositories-getting-started).
_MAX_GIT_BYTES = 64 << 20

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class _Location:
    """Where a file of the Hub is.

    Attributes:
        commit: commit that the revision is at present, or was when it was last asked for.
        blob: name of the blob with the file's content; None if a cached file has no blob, or one that is not named by
            its digest.
        sha256: SHA-256 of the content; None where only the blob itself can tell.
    """

    commit: str
    blob: str | None
    sha256: str | None = None


def fetch_into_hub_cache(
    request: FetchRequest,
    report: Report,
    settings: Settings,
    fetch_one: Callable[[FetchRequest], FetchedFile],
    share: Share | None = None,
) -> FetchedFile:
    """Return a verified file of the Hub in huggingface_hub's cache.

    Args:
        request: request with a ``hub_file``.
        report: receives the progress.
        settings: deadlines and retries.
        fetch_one: fetches a file into a cache directory.
        share: this node's part in a download of several nodes. Then one of them asks the Hub for the commit.

    Raises:
        OfflineError: offline mode is on, and the file is not in the cache.
        FetchError: the Hub does not serve the file.
        VerificationError: the content is not what the Hub's listing says.
        CacheError: the cache cannot be used.
    """
    file = request.hub_file
    assert file is not None
    for name in ("refs", "blobs", "snapshots"):
        check_links(directory_of(file.repository) / name)
    if share is None:
        location = _locate(request, report, settings)
    else:

        def locate(is_patient: bool) -> dict[str, Any]:
            found = _locate(request, report, settings if is_patient else replace(settings, retries=0))
            return asdict(_with_digest(found, file.repository))

        location = _checked(_Location(**share.first_answer(locate)), request.url.display_name)
    path = snapshot_path_of(file, location.commit)
    check_links(path.parent)
    if not path.is_file():
        at_commit = replace(request, hub_file=replace(file, revision=location.commit))
        if location.blob is None:  # another node has a file that it cannot share
            location = _locate(at_commit, report, settings)
        assert location.blob is not None
        blob = directory_of(file.repository) / "blobs" / location.blob
        make_directory(blob.parent)
        fetched = fetch_one(_request_for(blob, at_commit, location.sha256))
        if fetched.path != blob:  # another file is in its place, and stays
            return fetched
        link_snapshot(path, fetched.path)
        fetched = _as_snapshot(fetched, path)
    else:
        fetched = _cached(path, request, fetch_one)
    remember_commit(file.repository, file.revision, location.commit)
    return fetched


def _locate(request: FetchRequest, report: Report, settings: Settings) -> _Location:
    """Return where a file is: in the cache, or else at the Hub. A small one is then downloaded.

    Raises:
        OfflineError: it is not in the cache, and offline mode is on.
        FetchError: the Hub does not serve the file.
    """
    file = request.hub_file
    assert file is not None
    path = None if request.refresh and not is_commit(file.revision) else find_cached(file)
    if path is not None:
        name = path.readlink().name if path.is_symlink() else None
        commit = commit_of(directory_of(file.repository), file.revision)
        assert commit is not None
        return _Location(commit, name if described_blob(name, 0) else None)
    display_name = request.url.display_name
    if request.offline:
        raise OfflineError(
            f"{display_name} is not in huggingface_hub's cache ({directory_of(file.repository)}), and offline mode "
            f"forbids fetching it. On a node with internet access, run: rankload prefetch {display_name}",
            url=display_name,
        )
    listing = list_repository(file.repository, file.revision, settings, report)
    if file.path not in listing.blobs:
        raise FetchError(
            f"{display_name}: the repository has no such file at commit {listing.commit}", url=display_name
        )
    at_commit = replace(request, hub_file=replace(file, revision=listing.commit))
    blob = listing.blobs[file.path] or _ask_for_blob(at_commit, report, settings)
    path = directory_of(file.repository) / "blobs" / blob.name
    if blob.sha256 is None and not path.exists():
        make_directory(path.parent)
        _download_small(blob, path, at_commit, report, settings)
    return _Location(listing.commit, blob.name)


def _with_digest(location: _Location, repository: str) -> _Location:
    """Return a location with the content's SHA-256, for nodes that do not have the content.

    Raises:
        VerificationError: the blob is damaged.
    """
    if location.blob is None or len(location.blob) == 64:
        return replace(location, sha256=location.blob)
    return replace(location, sha256=_sha256_of_git_blob(directory_of(repository) / "blobs" / location.blob))


def _checked(location: _Location, display_name: str) -> _Location:
    """Return a location that another node has sent, whose parts become parts of paths.

    Raises:
        CoordinationError: it names no commit, or no blob.
    """
    if not is_commit(location.commit) or not (location.blob is None or described_blob(location.blob, 0)):
        raise CoordinationError(f"{display_name}: a rank says that it is at {printable(repr(location))[:200]}")
    return location


def _cached(path: Path, request: FetchRequest, fetch_one: Callable[[FetchRequest], FetchedFile]) -> FetchedFile:
    """Check a file that is in the cache, and return it."""
    if not path.is_symlink():  # a cache on a filesystem without links has no blobs
        found = fetch_one(replace(request, urls=(Url.parse(str(path)),), hub_file=None, is_index=False))
        return replace(found, source="cache")
    blob = Path(os.path.normpath(path.parent / path.readlink()))
    assert request.hub_file is not None
    if blob.parent != directory_of(request.hub_file.repository) / "blobs":
        check_links(path)
    found = fetch_one(_request_for(blob, request))
    return _as_snapshot(found, path) if found.path == blob else found  # a damaged blob stays where it is


def _request_for(blob: Path, request: FetchRequest, sha256: str | None = None) -> FetchRequest:
    """Return the request for a blob, whose name vouches for its content.

    Args:
        blob: path of the blob.
        request: request for the file.
        sha256: SHA-256 that another node has found a blob to have whose name is git's SHA-1.

    Raises:
        DigestMismatchError: the caller expects another digest.
        VerificationError: a blob that is in the cache is damaged.
    """
    request = replace(
        request,
        urls=(_url_at_commit(request),),
        directory=blob.parent,
        file_name=blob.name,
        hub_file=None,
        refresh=False,
    )
    if described_blob(blob.name, 0) is None:  # a proxy of the Hub gave another ETag, by which huggingface_hub named it
        return request
    if len(blob.name) == 64:
        sha256, source = blob.name, "x-linked-etag"
    else:
        sha256, source = sha256 if sha256 and not blob.exists() else _sha256_of_git_blob(blob), "git"
    check_digest(sha256, claims_of(request), request.url.display_name)
    return request if request.sha256 else replace(request, sha256=sha256, sha256_source=source)


def _as_snapshot(file: FetchedFile, path: Path) -> FetchedFile:
    """Return a blob under its path in the snapshot. Nobody rewrites a blob, so it may stay mapped."""
    with wrap_read_errors(file.path):
        return replace(file, path=path, is_published=is_trusted(file.path.stat().st_uid))


def _ask_for_blob(request: FetchRequest, report: Report, settings: Settings) -> HubBlob:
    """Return what the response for a file says of its content: a proxy of the Hub may list names alone."""
    url = _url_at_commit(request)
    with closing(origin_for(url, headers_of(request, url), settings)) as origin:
        version = read_bounded(origin, 0, 1, None, most_bytes=1, settings=settings, report=report).version
    name = version.claim.sha256 if version.claim else (version.etag or "").removeprefix("W/").strip('"')
    if (blob := described_blob(name, version.size_bytes)) is None:
        text = f"{url}: the response has no ETag of a Hub, and huggingface_hub's cache needs one: pass model_dir="
        raise FetchError(text, url=url.display_name)
    return blob


def _download_small(blob: HubBlob, path: Path, request: FetchRequest, report: Report, settings: Settings) -> None:
    """Download a file that is in git itself, and publish it once its SHA-1 is right."""
    url = _url_at_commit(request)
    limit = SizeLimit(request.max_bytes, request.downloaded_bytes)
    limit.check(url.display_name, blob.size_bytes, is_announced=True)
    if blob.size_bytes > _MAX_GIT_BYTES:
        raise FetchError(f"{url}: {blob.size_bytes} bytes that are not in Git LFS: refused", url=url.display_name)
    with closing(origin_for(url, headers_of(request, url), settings)) as origin:
        content = read_bounded(
            origin, 0, None, None, most_bytes=blob.size_bytes + 1, settings=settings, report=report
        ).content
    if _git_sha1(content) != blob.name:
        raise VerificationError(f"{url}: its content is not what the Hub's listing says ({blob.name})", path=str(path))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.incomplete")  # as huggingface_hub names them
    with wrap_write_errors(path):
        try:
            with open_new(temporary) as text:
                text.buffer.write(content)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _sha256_of_git_blob(path: Path) -> str:
    with wrap_read_errors(path), open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        sha1, sha256, done = _begun_sha1(size_bytes), hashlib.sha256(), 0
        while done < size_bytes and (piece := file.read(_READ_BYTES)):
            sha1.update(piece)
            sha256.update(piece)
            done += len(piece)
    if sha1.hexdigest() != path.name:
        raise VerificationError(f"{path} is damaged: its name is git's SHA-1 of its content; remove it", path=str(path))
    return sha256.hexdigest()


def _git_sha1(content: bytes) -> str:
    """Return the name that git gives a file's content."""
    sha1 = _begun_sha1(len(content))
    sha1.update(content)
    return sha1.hexdigest()


def _begun_sha1(size_bytes: int) -> hashlib._Hash:
    """Return the digest of what git puts before a content (gitformat-pack: "blob", a space, the length, NUL)."""
    return hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)


def _url_at_commit(request: FetchRequest) -> Url:
    assert request.hub_file is not None
    return Url.parse(request.hub_file.url)
