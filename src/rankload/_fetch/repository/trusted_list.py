"""torch.hub's list of trusted repositories: who is asked before code from a repository runs."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from rankload._cache.access import mode_of_new_in
from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._coordination.launchers import identity_from_environment
from rankload._fetch.repository.repository_name import RepositoryName
from rankload.errors import ArgumentError

_logger = logging.getLogger("rankload")

#: torch/hub.py, _TRUSTED_REPO_OWNERS.
_TRUSTED_OWNERS = frozenset({"facebookresearch", "facebookincubator", "pytorch", "fairinternal"})

_LIST = "trusted_list"


def check_trust(name: RepositoryName, existing: Path | None, hub_dir: Path, trust_repo: object) -> None:
    """Check that the user trusts a repository; remember it if so.

    Args:
        name: the repository.
        existing: its directory if it was fetched before: then it is trusted, as in torch.hub.
        hub_dir: torch.hub's directory, with the list.
        trust_repo: as in torch.hub.load. Nobody is asked under a launcher: a prompt would stop all ranks.

    Raises:
        ArgumentError: the user does not trust the repository, or nobody can be asked.
    """
    path = hub_dir / _LIST
    with suppress(OSError):
        path.touch(0o666 & mode_of_new_in(hub_dir))
    is_trusted = name.owner in _TRUSTED_OWNERS or existing is not None or name.owner_name in _listed(path)
    if trust_repo is False or (trust_repo == "check" and not is_trusted):
        _ask(name, is_trusted)
    if not is_trusted:
        with wrap_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(f"{name.owner_name}\n")  # one short write in append mode: ranks do not mix their lines


def _listed(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with wrap_read_errors(path):
        return {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}


def _ask(name: RepositoryName, is_trusted: bool) -> None:
    question = (
        f"The repository {name.owner_name} does not belong to the list of trusted repositories and as such cannot be "
        "downloaded. Do you trust this repository and wish to add it to the trusted list of repositories (y/N)?"
    )
    advice = "pass trust_repo=True if you trust it: its code will run in your job"
    if identity_from_environment().world_size > 1:
        raise ArgumentError(f"the repository {name.owner}/{name.name} is not in the list of trusted ones: {advice}")
    try:
        answer = input(question).lower()
    except EOFError:
        raise ArgumentError(f"{question}\nthere is nobody to ask: {advice}") from None
    if answer in ("n", "no", ""):
        raise ArgumentError(f"Untrusted repository. {name.owner}/{name.name}: {advice}")
    if answer not in ("y", "yes"):
        raise ArgumentError(f"Unrecognized response {answer!r}.")
    if is_trusted:
        _logger.info("the repository %s/%s is already trusted", name.owner, name.name)
