"""Files of the Hugging Face Hub in huggingface_hub's own cache, so that nothing is stored twice.

Its layout (huggingface_hub, "Understand caching")::

    <cache>/models--org--name/blobs/<digest>             the content: SHA-256 of a large file, git's SHA-1 of others
    <cache>/models--org--name/snapshots/<commit>/<path>  a link to the blob
    <cache>/models--org--name/refs/<revision>            the commit that a branch or tag was, when last asked for

A blob is looked up, downloaded, verified and recorded like any other file; its name is its digest. huggingface_hub
finds what is fetched here, and this module finds what huggingface_hub has fetched. Both replace blobs by rename alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from rankload._cache.access import is_trusted, open_new
from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._fetch.bounded_read import read_bounded
from rankload._fetch.digests import check_digest, claims_of
from rankload._fetch.hub_listing import HubBlob, described_blob, is_commit, list_repository
from rankload._fetch.hub_names import HubFile, HubRepository
from rankload._fetch.hub_weights import choose_weights
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._fetch.origins.registry import origin_for
from rankload._fetch.transfer.size_limit import SizeLimit
from rankload._settings import Settings
from rankload._types import FetchedFile, Report
from rankload._urls import Url
from rankload.errors import FetchError, OfflineError, VerificationError

#: Largest content that is read into memory to compare it with git's SHA-1. The Hub keeps files of more than 10 MB in
#: Git LFS (huggingface.co/docs/hub/repositories-getting-started).
_MAX_GIT_BYTES = 64 << 20


def cache_directory() -> Path:
    """Return the directory of huggingface_hub's cache.

    Raises:
        FetchError: huggingface_hub is not installed.
    """
    with wrap_any_errors("hf://", "the Hugging Face Hub"):
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def directory_of(repository: str) -> Path:
    """Return the directory of a repository of models in huggingface_hub's cache."""
    return cache_directory() / f"models--{repository.replace('/', '--')}"


def find_cached(file: HubFile) -> Path | None:
    """Return the path of a file in huggingface_hub's cache; None if it is not there."""
    commit = _commit_of(directory_of(file.repository), file.revision)
    path = _snapshot_path(file, commit) if commit else None
    return path if path is not None and path.is_file() else None


class HubMemory:
    """Which file a repository's weights are, according to huggingface_hub's cache.

    Args:
        is_kept: whether to note what was found; False for a caller that puts no file into the cache.
    """

    def __init__(self, *, is_kept: bool = True) -> None:
        self._is_kept = is_kept

    def recall(self, repository: HubRepository) -> str | None:
        """Return the URL of the weights that are in the cache; None if there are none."""
        directory = directory_of(repository.name)
        if (commit := _commit_of(directory, repository.revision)) is None:
            return None
        try:
            names = [path.name for path in (directory / "snapshots" / commit).iterdir()]
            name = choose_weights(names, repository.variant, repository.display_name)
        except (OSError, FetchError):
            return None
        return HubFile(repository.name, commit, name).url

    def keep(self, repository: HubRepository, url: str) -> None:
        """Note which commit the revision is, as huggingface_hub does before it downloads."""
        file = HubFile.parse(url) if self._is_kept else None
        if file is not None and file.revision is not None:
            _remember_commit(repository.name, repository.revision, file.revision)


def fetch_into_hub_cache(
    request: FetchRequest, report: Report, settings: Settings, fetch_one: Callable[[FetchRequest], FetchedFile]
) -> FetchedFile:
    """Return a verified file of the Hub in huggingface_hub's cache.

    Args:
        request: request with a ``hub_file``.
        report: receives the progress.
        settings: deadlines and retries.
        fetch_one: fetches a file into a cache directory.

    Raises:
        OfflineError: offline mode is on, and the file is not in the cache.
        FetchError: the Hub does not serve the file.
        VerificationError: the content is not what the Hub's listing says.
        CacheError: the cache cannot be used.
    """
    file = request.hub_file
    assert file is not None
    path = None if request.refresh and not is_commit(file.revision) else find_cached(file)
    if path is not None:
        return _cached(path, request, fetch_one)
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
    path = _snapshot_path(file, listing.commit)
    blobs = directory_of(file.repository) / "blobs"
    make_directory(blobs)
    if blob.sha256 is None and not (blobs / blob.name).exists():
        _download_small(blob, blobs / blob.name, at_commit, report, settings)
    fetched = fetch_one(_request_for(blobs / blob.name, at_commit))
    if fetched.path != blobs / blob.name:  # another file is in its place, and stays
        return fetched
    _link(path, fetched.path)
    _remember_commit(file.repository, file.revision, listing.commit)
    return _as_snapshot(fetched, path)


def _cached(path: Path, request: FetchRequest, fetch_one: Callable[[FetchRequest], FetchedFile]) -> FetchedFile:
    """Check a file that is in the cache, and return it."""
    if not path.is_symlink():  # a cache on a filesystem without links has no blobs
        found = fetch_one(replace(request, urls=(Url.parse(str(path)),), hub_file=None, is_index=False))
        return replace(found, source="cache")
    blob = Path(os.path.normpath(path.parent / path.readlink()))
    found = fetch_one(_request_for(blob, request))
    return _as_snapshot(found, path) if found.path == blob else found  # a damaged blob stays where it is


def _request_for(blob: Path, request: FetchRequest) -> FetchRequest:
    """Return the request for a blob, whose name vouches for its content.

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
    sha256, source = (blob.name, "x-linked-etag") if len(blob.name) == 64 else (_sha256_of_git_blob(blob), "git")
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
    with wrap_read_errors(path):
        content = path.read_bytes()
    if _git_sha1(content) != path.name:
        raise VerificationError(f"{path} is damaged: its name is git's SHA-1 of its content; remove it", path=str(path))
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    """Return the name that git gives a file's content (gitformat-pack: "blob", a space, the length, NUL)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _url_at_commit(request: FetchRequest) -> Url:
    assert request.hub_file is not None
    return Url.parse(request.hub_file.url)


def _snapshot_path(file: HubFile, commit: str) -> Path:
    return directory_of(file.repository) / replace(file, revision=commit).snapshot_path


def _commit_of(directory: Path, revision: str | None) -> str | None:
    """Return the commit that a revision was when it was last asked for; None if it never was."""
    if is_commit(revision):
        return revision
    try:
        commit = (directory / "refs" / (revision or "main")).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def _link(path: Path, blob: Path) -> None:
    """Make the snapshot's link to a blob; where the filesystem has no symbolic links, a hard link."""
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            temporary.symlink_to(os.path.relpath(blob, path.parent))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            os.link(blob, temporary)
        temporary.replace(path)


def _remember_commit(repository: str, revision: str | None, commit: str) -> None:
    """Note which commit a branch is. A cache that cannot be written forgets it: the next call asks again."""
    if is_commit(revision) or _commit_of(directory_of(repository), revision) == commit:
        return
    path = directory_of(repository) / "refs" / (revision or "main")
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(commit, encoding="ascii")
        temporary.replace(path)
    with suppress(OSError):
        temporary.unlink()  # exists only after an error
