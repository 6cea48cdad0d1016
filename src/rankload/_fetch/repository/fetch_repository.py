"""Fetch a repository into torch.hub's directory, and give it its name when all of it is there."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rankload._cache.access import make_own_directory, mode_of_new_in
from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_write_errors
from rankload._cache.layout import Entry
from rankload._fetch.partials.owner import own_path, owner_of, partials_of
from rankload._fetch.repository.github import archive_urls, check_reference, default_branch
from rankload._fetch.repository.repository_name import RepositoryName
from rankload._fetch.repository.unpack_repository import unpack_repository
from rankload._fetch.to_path import download_to
from rankload._platform.linux import exchange
from rankload._settings import Settings
from rankload._types import Report
from rankload._urls import OWN_DIRECTORY
from rankload.errors import HTTPStatusError, OfflineError

_logger = logging.getLogger("rankload")


@dataclass(frozen=True)
class RepositoryRequest:
    """A request for a repository.

    Attributes:
        name: the repository.
        hub_dir: torch.hub's directory; absolute.
        is_reloaded: fetch it even if it is there.
        is_validated: check that the reference belongs to the repository, not to a fork.
    """

    name: RepositoryName
    hub_dir: Path
    is_reloaded: bool = False
    is_validated: bool = True

    def existing(self) -> Path | None:
        """Return the directory of the repository if it is there.

        Without a reference, ``main`` counts before ``master``, and nobody is asked which of them is the default branch.
        """
        refs = ("main", "master") if self.name.ref is None else (self.name.ref,)
        paths = (self.hub_dir / self.name.directory_name(ref) for ref in refs)
        return next((path for path in paths if path.exists()), None)


def fetch_repository(request: RepositoryRequest, report: Report, settings: Settings) -> Path:
    """Fetch and unpack a repository, and return its directory. The caller sees to it that one process does so.

    Raises:
        OfflineError: offline mode is on.
        ArgumentError: the reference does not belong to the repository.
        FetchError: GitHub does not answer, or not with an archive.
        VerificationError: the archive is refused.
        CacheError: the directory cannot be written.
    """
    name = request.name
    if settings.offline:
        raise OfflineError(f"{name}: offline mode forbids fetching this repository", url=f"github.com/{name}")
    make_directory(request.hub_dir)
    ref = name.ref or default_branch(name, report, settings)
    path = request.hub_dir / name.directory_name(ref)
    if path.exists() and not request.is_reloaded:
        return path
    if request.is_validated:
        check_reference(name, ref, report, settings)
    with _work_directory(path) as work:
        origin = _download(name, ref, work / "archive.zip", settings)
        unpack_repository(work / "archive.zip", work / "tree", origin, mode_of_new_in(request.hub_dir))
        with wrap_write_errors(path):
            _replace(path, work / "tree", work / "replaced")
    _logger.info("fetched %s:%s to %s", name, ref, path)
    return path


def _download(name: RepositoryName, ref: str, path: Path, settings: Settings) -> str:
    try:
        urls = archive_urls(name, ref)
        download_to(urls, path, None, progress=False, settings=settings)
    except HTTPStatusError as error:
        if error.code != 300:
            raise
        warnings.warn(
            f"The ref {ref} is ambiguous. Perhaps it is both a tag and a branch in the repo? Torchhub will now assume "
            "that it's a branch. You can disambiguate tags and branches by explicitly passing refs/heads/branch_name "
            "or refs/tags/tag_name as the ref. That might require using skip_validation=True.",
            stacklevel=2,
        )
        urls = archive_urls(name, f"refs/heads/{ref}")
        download_to(urls, path, None, progress=False, settings=settings)
    return urls[0]


@contextmanager
def _work_directory(path: Path) -> Iterator[Path]:
    """Make a directory of this process beside a repository's, and remove it, and those of dead processes."""
    own = path.parent / OWN_DIRECTORY
    entry = Entry(own / "repositories" / path.name)
    with wrap_write_errors(path):
        make_own_directory(own)
        make_own_directory(entry.path.parent)
        work = own_path(entry)
        work.mkdir(mode_of_new_in(path.parent))
    try:
        for other in partials_of(entry):
            owner = owner_of(other)
            if owner is not None and owner.is_dead:
                shutil.rmtree(other, ignore_errors=True)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(path: Path, tree: Path, replaced: Path) -> None:
    """Give the tree its name. What had the name before is moved into the work directory, and goes with that."""
    if not path.is_symlink() and not path.exists():
        try:
            tree.rename(path)
        except OSError:
            if not path.exists():  # else another process has been faster
                raise
        return
    if exchange(tree, path):
        return
    path.rename(replaced)
    tree.rename(path)
