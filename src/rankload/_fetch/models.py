"""`FetchRequest`: a request for one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rankload._fetch.checkpoint_table import NamedCheckpoint
from rankload._fetch.hub_names import HubFile, HubRepository
from rankload._types import Scope, Verify
from rankload._urls import Url


@dataclass(frozen=True)
class FetchRequest:
    """A request for one file: the source, the place in the cache, and the checks. Built once per call; no I/O.

    Attributes:
        urls: the URL and its mirrors, in order of preference; never empty.
        directory: cache directory on this node; absolute, ``~`` expanded.
        file_name: path of the file below ``directory``; relative, without ``..``.
        sha256: full expected digest, 64 lower-case hex digits; None if unknown.
        sha256_source: where ``sha256`` comes from: ``sha256`` (the argument) or ``sidecar``.
        hash_prefix: leading hex digits of the SHA-256 that the file name promises under ``check_hash``; None if the
            caller did not ask for the check.
        is_index: the file is the index of a checkpoint in several files. The index has its own folder, for its URL
            only.
        is_part: the file is a part that a fetched index names. It is stored beside the index.
        is_renewal: the file replaces a part of a cached checkpoint in several files. The origin may have replaced the
            other parts, too.
        must_be_checkpoint: reject files that are no checkpoint (a web page, a tar of JPEGs).
        hub_file: the file on the Hugging Face Hub, if the cache is huggingface_hub's own; ``directory`` is then that of
            the repository in it.
        weights: the repository on the Hugging Face Hub that the URL names, while it is not known which file its weights
            are; ``file_name`` is then meaningless.
        headers: extra request headers for the first URL's host; never logged, never recorded.
        verify: when to hash a cached file again.
        named: the checkpoint in a table whose name the caller passed; None for a URL.
        sidecar: require the digest in ``<url>.sha256`` at the origin.
        scope: which ranks share one download.
        progress: show a progress bar on the downloading rank.
        offline: never open a socket.
        refresh: ask the origin whether the cached file is still current.
        max_bytes: the most that the call may download, in bytes; None for no limit.
        downloaded_bytes: bytes that other files of the same call have downloaded already.
    """

    urls: tuple[Url, ...]
    directory: Path
    file_name: str
    sha256: str | None = None
    sha256_source: str = "sha256"
    hash_prefix: str | None = None
    must_be_checkpoint: bool = True
    is_index: bool = False
    is_part: bool = False
    is_renewal: bool = False
    hub_file: HubFile | None = None
    weights: HubWeights | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    verify: Verify = "once"
    named: NamedCheckpoint | None = None
    sidecar: bool = False
    scope: Scope = "auto"
    progress: bool = True
    offline: bool = False
    refresh: bool = False
    max_bytes: int | None = None
    downloaded_bytes: int = 0

    @property
    def url(self) -> Url:
        """The first URL: the others are its mirrors."""
        return self.urls[0]

    @property
    def digest(self) -> str | None:
        """Leading hex digits that the SHA-256 must have; None if the caller expects none."""
        return self.sha256 or self.hash_prefix

    @property
    def needs_sidecar(self) -> bool:
        """Whether the sidecar must give the digest, and has not been read yet."""
        return self.sidecar and self.sha256 is None


class WeightsMemory(Protocol):
    """Remembers which file a repository's weights were.

    Attributes:
        directory: directory of the memory; processes with the same directory have the same memory.
    """

    directory: Path

    def recall(self, repository: HubRepository) -> str | None:
        """Return the URL of the weights that an earlier call found; None if there was no such call."""

    def keep(self, repository: HubRepository, url: str) -> None:
        """Remember the URL of the weights."""


@dataclass(frozen=True)
class HubWeights:
    """The weights of a repository on the Hugging Face Hub, of which it is not known yet which file they are.

    Attributes:
        repository: the repository.
        memory: remembers which file they were.
        request_for: returns the request for a file, from its URL.
        check_hash: whether the file's name must have a prefix of its digest.
    """

    repository: HubRepository
    memory: WeightsMemory
    request_for: Callable[[str], FetchRequest]
    check_hash: bool = False
