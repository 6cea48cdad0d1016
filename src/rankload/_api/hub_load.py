"""torch.hub's repositories: fetched once, imported by every rank."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch.hub

from rankload._api.call import collective_call
from rankload._api.once_per_job import once_per_job
from rankload._api.tracebacks import short_tracebacks
from rankload._cache.directory import make_directory
from rankload._coordination.membership import own_identity
from rankload._fetch.cache_domain import find_domain
from rankload._fetch.repository.repository_name import RepositoryName
from rankload._fetch.repository.trusted_list import check_trust
from rankload._settings import Settings
from rankload._types import Progress
from rankload._urls import expanded
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rankload._fetch.repository.fetch_repository import RepositoryRequest

_HUBCONF = "hubconf.py"

#: torch.hub's own function, also while `rankload.patch` replaces it.
_load_local: Callable[..., Any] = torch.hub.load


@short_tracebacks
def load(
    repo_or_dir: str,
    model: str,
    *args: Any,
    source: str = "github",
    trust_repo: bool | str = "check",
    force_reload: bool = False,
    verbose: bool = True,
    skip_validation: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model from a GitHub repository or a local directory, as torch.hub.load does. Not collective.

    The first process of a job that comes fetches the repository; the others wait for it and import it. A cached
    repository is used without a request.

    Args:
        repo_or_dir: ``owner/name[:ref]``, or with ``source="local"`` a directory. Without a reference, a cached
            ``main`` or ``master`` is used; else GitHub is asked for the default branch.
        model: name of an entry point in hubconf.py.
        *args: positional arguments of the entry point.
        source: ``"github"`` or ``"local"``.
        trust_repo: True trusts the repository and remembers that. ``"check"`` and False ask the user, ``"check"``
            only if the repository is not trusted yet. Under a launcher, nobody is asked: it is an error.
        force_reload: fetch the repository even if it is cached; once for all ranks of the job that make this call.
        verbose: say on stderr when a cached repository is used.
        skip_validation: do not ask GitHub's API whether the reference belongs to the repository.
        **kwargs: keyword arguments of the entry point.

    Returns:
        What the entry point returns.

    Raises:
        ArgumentError: an argument is invalid, or nobody trusts the repository.
        RankloadError: the repository cannot be fetched.
        Exception: any error of the entry point, and what torch.hub.load raises for a hubconf.py without it.
    """
    if _is_github(source):
        directory = _fetched(
            repo_or_dir,
            force_reload=force_reload,
            trust_repo=trust_repo,
            verbose=verbose,
            skip_validation=skip_validation,
        )
        repo_or_dir = str(directory)
    return _load_local(repo_or_dir, model, *args, source="local", **kwargs)


@short_tracebacks
def list_entry_points(
    github: str,
    force_reload: bool = False,
    skip_validation: bool = False,
    trust_repo: bool | str = "check",
    verbose: bool = True,
) -> list[str]:
    """Return the names of all entry points of a repository, like torch.hub.list. Not collective.

    Arguments and errors are those of `load`.
    """
    directory = _fetched(
        github, force_reload=force_reload, trust_repo=trust_repo, verbose=verbose, skip_validation=skip_validation
    )
    with _hubconf(directory) as module:
        return [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]


@short_tracebacks
def entry_point_help(
    github: str,
    model: str,
    force_reload: bool = False,
    skip_validation: bool = False,
    trust_repo: bool | str = "check",
) -> str | None:
    """Return the docstring of an entry point, like torch.hub.help. Not collective.

    Arguments and errors are those of `load`.
    """
    directory = _fetched(
        github, force_reload=force_reload, trust_repo=trust_repo, verbose=True, skip_validation=skip_validation
    )
    with _hubconf(directory) as module:
        entry_point = getattr(module, model, None)
        if not callable(entry_point):
            raise RuntimeError(f"Cannot find callable {model} in hubconf")
        text: str | None = entry_point.__doc__
        return text


@short_tracebacks
def dist_hub_load(
    repo_or_dir: str,
    model: str,
    *args: Any,
    source: str = "github",
    trust_repo: bool | str = "check",
    force_reload: bool = False,
    verbose: bool = True,
    skip_validation: bool = False,
    group: ProcessGroup | None = None,
    timeout: float | None = None,
    **kwargs: Any,
) -> Any:
    """Load a model from a GitHub repository on every rank; all ranks have it, or all raise the same error.

    **Collective**, like `rankload.dist_load_state_dict_from_url`: use it where every rank makes the call, and
    `rankload.hub.load` in code that ranks reach at different times, or that only some of them reach. One rank of each
    group of ranks that share torch.hub's directory fetches the repository. Then every rank imports it and calls the
    entry point; an error on any rank is raised on all. The entry point must make no collective call.

    Args:
        repo_or_dir, model, source, trust_repo, force_reload, verbose, skip_validation: as in `rankload.hub.load`.
        *args: positional arguments of the entry point.
        group: process group of the ranks that make this call.
        timeout: no-progress deadline in seconds. The entry point itself may take as long as its process lives.
        **kwargs: keyword arguments of the entry point.

    Returns:
        What the entry point returns.

    Raises:
        RankloadError: the same on every rank. An error of the entry point is a RankFailedError on the other ranks.
    """
    with collective_call(group, timeout) as call:
        is_github = _is_github(source)
        agreed = {"repository": repo_or_dir, "force_reload": force_reload} if is_github else {}
        call.channel.agree({"call": "hub_load", "model": model, "source": source, **agreed})
        if is_github:
            request = _request(repo_or_dir, force_reload=force_reload, skip_validation=skip_validation)
            make_directory(request.hub_dir)
            domain = find_domain(call.channel, "auto", request.hub_dir)
            name = f"repository/{domain.key}"
            if domain.is_leader:
                call.report(Progress("running"))
                directory = str(_used(request, trust_repo, call.settings, verbose=verbose))
                call.channel.post(name, {"directory": directory})
            else:
                directory = call.channel.wait_for(name, from_rank=domain.leader)["directory"]
            repo_or_dir = directory
        call.report(Progress("running"))
        return _load_local(repo_or_dir, model, *args, source="local", **kwargs)


def _is_github(source: str) -> bool:
    if not isinstance(source, str) or source.lower() not in ("github", "local"):
        raise ArgumentError(f'Unknown source: "{source}". Allowed values: "github" | "local".')
    return source.lower() == "github"


def _request(github: str, *, force_reload: bool, skip_validation: bool) -> RepositoryRequest:
    from rankload._fetch.repository.fetch_repository import RepositoryRequest  # imports requests

    hub_dir = expanded(torch.hub.get_dir()).absolute()
    return RepositoryRequest(RepositoryName.parse(github), hub_dir, force_reload, is_validated=not skip_validation)


def _fetched(github: str, *, force_reload: bool, trust_repo: bool | str, verbose: bool, skip_validation: bool) -> Path:
    request = _request(github, force_reload=force_reload, skip_validation=skip_validation)
    make_directory(request.hub_dir)
    return _used(request, trust_repo, Settings.from_environment(), verbose=verbose)


def _used(request: RepositoryRequest, trust_repo: bool | str, settings: Settings, *, verbose: bool) -> Path:
    """Return the repository's directory, cached or fetched."""
    from rankload._fetch.repository.fetch_repository import fetch_repository

    existing = request.existing()
    check_trust(request.name, existing, request.hub_dir, trust_repo)
    if existing is not None and not request.is_reloaded:
        if verbose and own_identity().rank == 0:
            sys.stderr.write(f"Using cache found in {existing}\n")
        return existing

    def fetch() -> str:
        return str(fetch_repository(request, lambda progress: None, settings))

    key = f"{'reload' if request.is_reloaded else 'fetch'} repository {request.name}"  # turns count calls of one kind
    return Path(once_per_job(fetch, key=key, directory=request.hub_dir, is_usable=os.path.exists))


@contextmanager
def _hubconf(directory: Path) -> Iterator[ModuleType]:
    """Import a repository's hubconf.py, with the repository's modules importable meanwhile."""
    sys.path.insert(0, str(directory))
    try:
        spec = importlib.util.spec_from_file_location(_HUBCONF, directory / _HUBCONF)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        with suppress(ValueError):
            sys.path.remove(str(directory))
