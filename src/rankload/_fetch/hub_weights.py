"""``hf://org/name``: a repository of the Hugging Face Hub without a file stands for the weights in it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from rankload._cache.access import make_own_directory, open_plain, write_own_json
from rankload._cache.directory import make_directory
from rankload._cache.files import wrap_write_errors
from rankload._fetch.origins.filesystem import wrap_any_errors
from rankload._text import printable
from rankload._urls import OWN_DIRECTORY, url_key
from rankload.errors import FetchError, OfflineError

_logger = logging.getLogger("rankload")

#: A repository of models, an optional revision (slashes as %2F), and an optional variant.
_REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/?#]+))?/?(?:\?(.*))?")

#: First parts of a URL that name another kind of repository.
_OTHER_KINDS = frozenset({"datasets", "spaces", "buckets", "kernels"})

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


@dataclass(frozen=True)
class HubRepository:
    """A repository on the Hub.

    Attributes:
        name: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        variant: which of several weights, such as ``fp16``; None for those without a variant.
    """

    name: str
    revision: str | None
    variant: str | None

    @classmethod
    def parse(cls, url: object) -> HubRepository | None:
        """Return the repository that a URL names; None for any other URL, and for a path."""
        match = _REPOSITORY.fullmatch(url) if isinstance(url, str) else None
        if match is None or match[1].partition("/")[0] in _OTHER_KINDS:
            return None
        query = dict(parse_qsl(match[3] or "", keep_blank_values=True))
        if query.keys() - {"variant"}:
            return None
        return cls(match[1], unquote(match[2]) if match[2] else None, query.get("variant") or None)


def choose_weights(names: Iterable[str], variant: str | None, display_name: str) -> str:
    """Return the name of a repository's weights: an index of safetensors, one such file, or the same of torch.save.

    Raises:
        FetchError: there are none, or several, so that the caller must name one.
    """
    at_top = [name for name in names if "/" not in name]
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


def resolve_weights(repository: HubRepository, directory: Path | None, *, offline: bool) -> str:
    """Return the URL of a repository's weights, at the commit that the revision is now.

    Args:
        repository: the repository.
        directory: cache directory, which remembers the answer for offline mode; None for none.
        offline: ask nobody; use what an earlier call has found.

    Raises:
        OfflineError: offline mode is on, and no earlier call has asked.
        FetchError: the Hub does not answer, or the repository has no weights.
    """
    display_name = f"hf://{repository.name}" + (f"@{repository.revision}" if repository.revision else "")
    key = url_key(f"{display_name}?{repository.variant}")[:32]
    memory = None if directory is None else directory / OWN_DIRECTORY / "hub" / f"{key}.json"
    if offline:
        return _remembered(memory, display_name)
    with wrap_any_errors(display_name, display_name):
        from huggingface_hub import HfApi

        found = HfApi().model_info(repository.name, revision=repository.revision)
        names = [sibling.rfilename for sibling in found.siblings or []]
        commit = found.sha
    name = choose_weights(names, repository.variant, display_name)
    url = f"hf://{repository.name}@{commit}/{quote(name)}"
    _logger.info("%s: %s at commit %s", display_name, name, commit)
    if memory is not None and directory is not None:
        make_directory(directory)
        with wrap_write_errors(memory):
            make_own_directory(memory.parent.parent)
            write_own_json(memory, {"url": url})
    return url


def _remembered(memory: Path | None, display_name: str) -> str:
    try:
        if memory is None:
            raise FileNotFoundError
        with os.fdopen(open_plain(memory), encoding="utf-8") as file:
            found = json.loads(file.read(1 << 16))["url"]
        if HubRepository.parse(found) is None and found.startswith("hf://"):
            return str(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise OfflineError(
        f"{display_name}: offline mode is on, and no earlier call has asked for this repository; on a node with "
        f"internet access, run: rankload prefetch {display_name}",
        url=display_name,
    )
