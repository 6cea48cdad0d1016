"""Names on the Hugging Face Hub: repositories and files in ``hf://`` URLs, and the Hub's own address."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, quote, unquote

from rankload._urls import server_of
from rankload.errors import ArgumentError

#: A repository of models, and an optional revision. Slashes in a revision are %2F, but for those of refs that the Hub
#: itself makes (huggingface_hub, HfFileSystem: SPECIAL_REFS_REVISION_REGEX).
_REPOSITORY = r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/?#]+|[^/?#]+))?"

_REPOSITORY_URL = re.compile(_REPOSITORY + r"/?(?:\?(?P<query>.*))?")
_FILE_URL = re.compile(_REPOSITORY + r"/(?P<path>[^?#]+)")

#: First parts of a URL that name another kind of repository.
_OTHER_KINDS = frozenset({"datasets", "spaces", "buckets", "kernels"})


def check_endpoint() -> None:
    """Check the address of the Hub in the environment, before huggingface_hub is imported.

    With an invalid one it fails at import, and would seem not to be installed. Its error may show a part of a password.

    Raises:
        ArgumentError: ``HF_ENDPOINT`` is no URL.
    """
    if (endpoint := os.environ.get("HF_ENDPOINT")) and server_of(endpoint) is None:
        raise ArgumentError("HF_ENDPOINT is not an http or https URL with a host: correct it, or unset it")


@dataclass(frozen=True)
class HubRepository:
    """A repository of models on the Hub.

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
        match = _match(_REPOSITORY_URL, url)
        if match is None:
            return None
        query = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
        revision = _unquoted(match["revision"])
        if query.keys() - {"variant"} or not _is_plain(revision or "main"):
            return None
        return cls(match["name"], revision, query.get("variant") or None)

    @property
    def display_name(self) -> str:
        """The URL without the variant, for messages."""
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of models on the Hub.

    Attributes:
        repository: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        path: path in the repository; relative, without ``..``.
    """

    repository: str
    revision: str | None
    path: str

    @classmethod
    def parse(cls, url: object) -> HubFile | None:
        """Return the file that a URL names; None for any other URL."""
        match = _match(_FILE_URL, url)
        if match is None:
            return None
        path, revision = unquote(match["path"]), _unquoted(match["revision"])
        is_plain = all(_is_plain(name) for name in (path, revision or "main"))
        return cls(match["name"], revision, path) if is_plain else None

    @property
    def url(self) -> str:
        """The file's ``hf://`` URL."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repository}{revision}/{quote(self.path)}"

    @property
    def snapshot_path(self) -> str:
        """Path in the repository's directory of huggingface_hub's cache, if the revision is a commit."""
        return f"snapshots/{self.revision or 'main'}/{self.path}"

    def beside(self, name: str, commit: str) -> HubFile:
        """Return another file of the same folder, at a commit."""
        return HubFile(self.repository, commit, str(PurePosixPath(self.path).with_name(name)))


def _match(pattern: re.Pattern[str], url: object) -> re.Match[str] | None:
    match = pattern.fullmatch(url) if isinstance(url, str) else None
    return None if match is None or match["name"].partition("/")[0] in _OTHER_KINDS else match


def _unquoted(revision: str | None) -> str | None:
    return unquote(revision) if revision else None


def _is_plain(path: str) -> bool:
    """Return whether a relative path stays below the directory that it is joined to."""
    return "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))
