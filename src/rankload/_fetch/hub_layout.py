"""The layout of huggingface_hub's cache: where its files are, and which commit a branch is.

As in huggingface_hub, "Understand caching"::

    <cache>/models--org--name/blobs/<digest>             the content: SHA-256 of a large file, git's SHA-1 of others
    <cache>/models--org--name/snapshots/<commit>/<path>  a link to the blob
    <cache>/models--org--name/refs/<revision>            the commit that a branch or tag was, when last asked for
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISLNK

from rankload._cache.access import is_trusted, name_of
from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._fetch.hub_listing import is_commit
from rankload._fetch.hub_names import HubFile, HubRepository, check_endpoint
from rankload._fetch.hub_weights import choose_weights
from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._formats.source import open_regular
from rankload.errors import CacheError, FetchError

#: A commit has 40 digits; what is longer is none.
_MAX_COMMIT_BYTES = 64


def cache_directory() -> Path:
    """Return the directory of huggingface_hub's cache.

    Raises:
        ArgumentError: ``HF_ENDPOINT`` is no URL.
        FetchError: huggingface_hub is not installed.
    """
    check_endpoint()
    with wrap_any_errors("hf://", "the Hugging Face Hub"):
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def directory_of(repository: str) -> Path:
    """Return the directory of a repository of models in huggingface_hub's cache."""
    return cache_directory() / f"models--{repository.replace('/', '--')}"


def find_cached(file: HubFile) -> Path | None:
    """Return the path of a file in huggingface_hub's cache; None if it is not there."""
    commit = commit_of(directory_of(file.repository), file.revision)
    path = snapshot_path_of(file, commit) if commit else None
    try:
        return path if path is not None and path.is_file() else None
    except OSError:  # the name is longer than any file's here
        return None


class HubMemory:
    """Which file a repository's weights are, according to huggingface_hub's cache.

    Args:
        is_kept: whether to note what was found; False for a caller that puts no file into the cache.

    Attributes:
        directory: directory in the cache in which other programs than huggingface_hub may keep files.
    """

    def __init__(self, *, is_kept: bool = True) -> None:
        self._is_kept = is_kept
        self.directory = cache_directory() / ".locks"  # huggingface_hub's scan leaves it out

    def recall(self, repository: HubRepository) -> str | None:
        """Return the URL of the weights that are in the cache; None if there are none."""
        directory = directory_of(repository.name)
        if (commit := commit_of(directory, repository.revision)) is None:
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
            remember_commit(repository.name, repository.revision, file.revision)


def check_links(path: Path) -> None:
    """Check that no link of another user leads to a path in huggingface_hub's cache: it could lead into any directory.

    This user's own links are followed: a repository may be on another disk.

    Raises:
        CacheError: there is such a link.
    """
    root = cache_directory()
    for one in (path, *path.parents):
        if one == root:
            break
        with suppress(FileNotFoundError), wrap_read_errors(one):
            status = one.lstat()
            if S_ISLNK(status.st_mode) and not is_trusted(status.st_uid):
                text = f"{one} is a symbolic link that belongs to {name_of(status.st_uid)}: refused; remove it"
                raise CacheError(text, path=str(one))


def snapshot_path_of(file: HubFile, commit: str) -> Path:
    """Return the path of a file at a commit."""
    return directory_of(file.repository) / replace(file, revision=commit).snapshot_path


def commit_of(directory: Path, revision: str | None) -> str | None:
    """Return the commit that a revision was when it was last asked for; None if it never was."""
    if is_commit(revision):
        return revision
    try:
        with open_regular(directory / "refs" / (revision or "main")) as file:
            commit = file.read(_MAX_COMMIT_BYTES).decode("ascii")
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def link_snapshot(path: Path, blob: Path) -> None:
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


def remember_commit(repository: str, revision: str | None, commit: str) -> None:
    """Note which commit a branch is. A cache that cannot be written forgets it: the next call asks again."""
    if is_commit(revision) or commit_of(directory_of(repository), revision) == commit:
        return
    path = directory_of(repository) / "refs" / (revision or "main")
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    with suppress(OSError):
        check_links(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(commit, encoding="ascii")
        temporary.replace(path)
    with suppress(OSError):
        temporary.unlink()  # exists only after an error
