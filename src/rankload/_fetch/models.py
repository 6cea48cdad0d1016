"""`FetchRequest`: what one fetch is to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rankload._types import Scope, Verify
from rankload._urls import Url


@dataclass(frozen=True)
class FetchRequest:
    """What to fetch, where to put it, and how to judge it. Made once from the call's arguments; no I/O.

    Attributes:
        urls: the URL and its mirrors, in order of preference; never empty.
        directory: the cache directory on this node, absolute, ``~`` expanded.
        file_name: the file's name in it, a relative path without ``..``.
        sha256: full expected digest, 64 lower-case hex digits; None when not known.
        sha256_source: who says so: ``sha256`` (the argument), ``sidecar``.
        hash_prefix: leading hex digits of the SHA-256 that the file name promises under ``check_hash``; None when
            not asked for.
        is_index: the caller asks for the index of a checkpoint in several files, by its name; it lies in a folder that
            is its URL's alone.
        is_part: an index that was fetched names it; it lies beside that.
        is_renewal: it replaces a file of such a checkpoint, whose others may have been replaced at the origin, too.
        must_be_checkpoint: refuse files that are no checkpoint (a web page, a tar of JPEGs).
        headers: extra request headers for the first URL's host; never logged, never recorded.
        verify: when to hash a cached file again.
        sidecar: the file ``<url>.sha256`` at the origin must vouch for it.
        scope: who shares one download.
        progress: show a progress bar on the downloading rank.
        offline: never open a socket.
        refresh: ask the origin whether a cached file is still its file.
        max_bytes: the most that the call may download; None for no limit.
        downloaded_bytes: what other files of the same call have taken of that.
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
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    verify: Verify = "once"
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
        """What the SHA-256 must start with, as far as the caller has said."""
        return self.sha256 or self.hash_prefix
