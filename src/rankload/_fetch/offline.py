"""Offline mode: whether it is on, and the error for a file that is not in the cache."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from rankload._cache.layout import Entry
from rankload._fetch.index_files import name_without_folder
from rankload._fetch.models import FetchRequest
from rankload._urls import Url, file_name_of
from rankload.errors import ArgumentError, OfflineError

#: Offline variables for hf:// URLs, which their users already set (huggingface_hub, transformers: "Offline mode").
_HUGGING_FACE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_switched_off(url: Url, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the variables of a URL's scheme forbid fetching the URL."""
    if url.scheme != "hf":
        return False
    return any(environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _HUGGING_FACE_VARIABLES)


def offline_error(entry: Entry, request: FetchRequest, damage: str) -> OfflineError:
    """Return the error for a file that is not in the cache, with the command that fetches it.

    Args:
        entry: cache entry of the file.
        request: request for the file.
        damage: why the cached file cannot be used; empty if there is none.
    """
    url = request.url.display_name
    words = ["rankload", "prefetch", url, "--model-dir", str(request.directory)]
    name = name_without_folder(request.file_name) if request.is_index else request.file_name
    if name != _usual_name(request.url):
        words += ["--file-name", name]
    if request.sha256 and request.sha256_source == "sha256":
        words += ["--sha256", request.sha256]
    if request.hash_prefix:
        words += ["--check-hash"]
    if not request.must_be_checkpoint:
        words += ["--any-file"]
    if request.sidecar:
        words += ["--sidecar"]
    secrets = [what for what, is_used in (("query", url != request.url.raw), ("headers", request.headers)) if is_used]
    advice = f" (with the {' and '.join(secrets)} of this call)" if secrets else ""
    why = f"{entry.path} cannot be used ({damage})" if damage else f"{entry.path} is not in the cache"
    return OfflineError(
        f"{why}, and offline mode forbids fetching {url}. On a node with internet access, "
        f"run{advice}: {shlex.join(words)}",
        url=url,
        path=str(entry.path),
    )


def _usual_name(url: Url) -> str | None:
    try:
        return file_name_of(url.raw)
    except ArgumentError:  # the URL names no file: the caller passed file_name=
        return None
