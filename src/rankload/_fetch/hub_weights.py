"""``hf://org/name``: a repository of the Hugging Face Hub without a file stands for the weights in it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rankload._cache.access import make_own_directory, open_plain, write_own_json
from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_write_errors
from rankload._fetch.hub_listing import list_repository
from rankload._fetch.hub_names import HubFile, HubRepository
from rankload._fetch.models import WeightsMemory
from rankload._settings import Settings
from rankload._text import printable
from rankload._types import Report
from rankload._urls import OWN_DIRECTORY, url_key
from rankload.errors import FetchError, FetchTimeoutError, NetworkError, OfflineError

_logger = logging.getLogger("rankload")

#: Names of weights in order of preference, with the variant in its place; ``*`` stands for one name only.
_CHOICES = (
    "model.safetensors.index{dot_variant}.json",
    "model{dot_variant}.safetensors",
    "diffusion_pytorch_model.safetensors.index{dot_variant}.json",
    "diffusion_pytorch_model{dot_variant}.safetensors",
    "*{dot_variant}.safetensors.index.json",
    "*{dot_variant}.safetensors",
    "pytorch_model.bin.index{dot_variant}.json",
    "pytorch_model{dot_variant}.bin",
    "*{dot_variant}.bin",
)


def choose_weights(names: Iterable[str], variant: str | None, display_name: str) -> str:
    """Return the name of a repository's weights: an index of safetensors, one such file, or the same of torch.save.

    Raises:
        FetchError: there are none, or several, so that the caller must name one.
    """
    # the Hub chooses the names, which become part of paths and logs
    at_top = [name for name in names if "/" not in name and name.isprintable()]
    dot_variant = f".{variant}" if variant else ""
    for choice in _CHOICES:
        wanted = choice.format(dot_variant=dot_variant)
        if "*" not in wanted:
            if wanted in at_top:
                return wanted
            continue
        ending = wanted.removeprefix("*")
        found = [name for name in at_top if name.endswith(ending)]
        if not variant:  # model.fp16.safetensors has one
            found = [name for name in found if "." not in name.removesuffix(ending)] or found
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(map(printable, sorted(found)))
            raise FetchError(f"{display_name}: it has several weights ({shown}): name one in the URL", url=display_name)
    what = f"variant {variant!r} of weights" if variant else "weights (*.safetensors, *.bin)"
    raise FetchError(f"{display_name}: it has no {what} at its top: name a file in the URL", url=display_name)


def resolve_weights(
    repository: HubRepository, memory: WeightsMemory, settings: Settings, *, offline: bool, report: Report | None = None
) -> str:
    """Return the URL of a repository's weights, at the commit that the revision is now.

    Args:
        repository: the repository.
        memory: remembers the answer for offline mode, and for a Hub that cannot be reached.
        settings: deadline and retries.
        offline: ask nobody; use what an earlier call has found.
        report: called during pauses.

    Raises:
        OfflineError: offline mode is on, and no earlier call has asked.
        FetchError: the Hub does not answer, or the repository has no weights.
    """
    display_name = repository.display_name
    if offline:
        if (known := memory.recall(repository)) is not None:
            return known
        raise OfflineError(
            f"{display_name}: offline mode is on, and no earlier call has asked for this repository; on a node with "
            f"internet access, run: rankload prefetch {display_name}",
            url=display_name,
        )
    known = memory.recall(repository)
    if known is not None:  # there is an answer: a Hub that cannot be reached is no reason to wait
        settings = replace(settings, retries=0)
    try:
        listing = list_repository(repository.name, repository.revision, settings, report)
    except (NetworkError, FetchTimeoutError) as error:
        if known is None or error.is_from_another_rank:
            raise
        _logger.warning("%s; using what an earlier call has found: %s", error.message, known)
        return known
    name = choose_weights(listing.blobs, repository.variant, display_name)
    url = HubFile(repository.name, listing.commit, name).url
    _logger.info("%s: %s at commit %s", display_name, name, listing.commit)
    memory.keep(repository, url)
    return url


class OwnMemory:
    """A memory in a cache directory of rankload's.

    Attributes:
        directory: the cache directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def recall(self, repository: HubRepository) -> str | None:
        """Return the URL that was kept; None without one."""
        try:
            with os.fdopen(open_plain(self._path_for(repository)), encoding="utf-8") as file:
                url = json.loads(file.read(1 << 16))["url"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        kept = HubFile.parse(url)  # perhaps another user's answer
        return url if kept is not None and kept.repository == repository.name else None

    def keep(self, repository: HubRepository, url: str) -> None:
        """Keep the URL in a file of rankload's own.

        Raises:
            CacheError: the file cannot be written.
        """
        path = self._path_for(repository)
        make_directory(self.directory)
        with wrap_write_errors(path):
            make_own_directory(path.parent.parent)
            write_own_json(path, {"url": url})

    def _path_for(self, repository: HubRepository) -> Path:
        key = url_key(f"{repository.display_name}?{repository.variant}")[:32]
        return self.directory / OWN_DIRECTORY / "hub" / f"{key}.json"
