"""Make a FetchRequest from a call's arguments, and check everything that can be checked without I/O."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, get_args

from rankload._cache.layout import checked_file_name, checkpoints_directory, hash_prefix_of
from rankload._fetch.checkpoint_table import NamedCheckpoint
from rankload._fetch.hub_names import HubFile
from rankload._fetch.index_files import is_index_name, name_in_own_folder
from rankload._fetch.models import FetchRequest
from rankload._fetch.offline import is_switched_off
from rankload._settings import MODEL_DIR_VARIABLE, Settings
from rankload._types import Scope, Verify, is_sha256
from rankload._urls import Url, expanded, file_name_of, query_digests, redact
from rankload.errors import ArgumentError

_logger = logging.getLogger("rankload")

#: Name of a header: a token (RFC 9110, 5.6.2).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

#: A URL or a path, or a URL and its mirrors.
UrlArgument = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class RequestOptions(TypedDict, total=False):
    """Arguments of a public call for a FetchRequest, besides the URL, the directory and the scope."""

    check_hash: bool
    file_name: str | None
    progress: bool
    sha256: str | None
    headers: Mapping[str, str] | None
    verify: Verify
    sidecar: bool
    offline: bool | None
    must_be_checkpoint: bool
    max_bytes: int | None
    refresh: bool


def with_named(options: RequestOptions, named: NamedCheckpoint) -> RequestOptions:
    """Return a call's arguments with the digest of the table.

    Raises:
        ArgumentError: the call has another digest.
    """
    given = _checked_sha256(options.get("sha256"))
    if given and named.sha256 and given != named.sha256:
        raise ArgumentError(f"sha256={given!r}: {named.table} has another digest for {named.name}: pass one of them")
    return {**options, "sha256": given or named.sha256}


def make_request(
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings,
    *,
    check_hash: bool = False,
    file_name: str | None = None,
    progress: bool = True,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    scope: Scope = "auto",
    verify: Verify = "once",
    sidecar: bool = False,
    offline: bool | None = None,
    must_be_checkpoint: bool = True,
    max_bytes: int | None = None,
    refresh: bool = False,
) -> FetchRequest:
    """Check the arguments of a public call, and make a request from them.

    Args:
        url: a URL or a path, or a URL and its mirrors.
        model_dir: cache directory; None for the default one.
        settings: values for arguments that are None.
        must_be_checkpoint: refuse files that are not checkpoints.
        check_hash, file_name, progress, sha256, headers, scope, verify, sidecar, offline, max_bytes, refresh: as in
            `rankload.dist_load_state_dict_from_url`.

    Raises:
        ArgumentError: an argument is invalid; the message names it, its value, and the expected one.
    """
    urls = checked_urls(url)
    local_path = urls[0].local_path
    is_for_hub_cache = len(urls) == 1 and uses_hub_cache(model_dir, file_name)
    hub_file = HubFile.parse(urls[0].raw) if is_for_hub_cache else None
    name = checked_file_name(file_name) if file_name else local_path.name if local_path else file_name_of(urls[0].raw)
    is_index = local_path is None and (is_index_name(PurePosixPath(name).name) or _names_index(urls[0]))
    if hub_file is not None:
        from rankload._fetch.hub_layout import directory_of  # imports huggingface_hub

        directory, name = directory_of(hub_file.repository), hub_file.snapshot_path
    elif model_dir is not None:
        directory = expanded(model_dir).absolute()
    else:  # a local file needs no cache
        directory = local_path.parent if local_path is not None else default_directory()
    is_offline = (settings.offline if offline is None else offline) or is_switched_off(urls[0])
    if refresh and is_offline:
        raise ArgumentError("refresh=True asks the origin, and offline mode forbids that: pass one of them")
    return FetchRequest(
        urls=urls,
        directory=directory,
        file_name=name_in_own_folder(name, urls[0].key) if is_index and hub_file is None else name,
        is_index=is_index,
        hub_file=hub_file,
        sha256=_checked_sha256(sha256),
        hash_prefix=_promised_prefix(local_path.name if local_path else name, settings) if check_hash else None,
        must_be_checkpoint=must_be_checkpoint,
        headers=checked_headers(headers or {}),
        verify=_checked_choice("verify", verify, get_args(Verify)),
        sidecar=sidecar,
        scope=_checked_choice("scope", scope, get_args(Scope)),
        progress=progress,
        offline=is_offline,
        refresh=refresh or settings.refresh,
        max_bytes=(settings.max_bytes or None) if max_bytes is None else _checked_max_bytes(max_bytes),
    )


def _names_index(url: Url) -> bool:
    """Return whether the file name in a URL is that of an index."""
    try:
        return is_index_name(file_name_of(url.raw))
    except ArgumentError:  # the URL names no file
        return False


def agreed_arguments(request: FetchRequest, call: str) -> dict[str, Any]:
    """Return the arguments that must be equal on all ranks, without secrets, so that messages may show them.

    ``model_dir``, ``map_location`` and ``progress`` may differ between nodes.

    Args:
        request: request of this rank.
        call: name of the public call.
    """
    is_local = request.url.local_path is not None
    return {
        "call": call,
        "url": [url.display_name for url in request.urls],
        "origin": [url.key[:16] for url in request.urls],
        "query": [query_digests(url.raw) for url in request.urls],
        # of a path the origin says the same; what follows the question mark may be the query of a mistyped URL
        "file_name": request.file_name.partition("?")[0] if is_local else request.file_name,
        "sha256": request.sha256,
        "check_hash": request.weights.check_hash if request.weights else request.hash_prefix is not None,
        "scope": request.scope,
        "refresh": request.refresh,
        "adapt": request.named.adapt if request.named else None,
    }


def uses_hub_cache(model_dir: str | os.PathLike[str] | None, file_name: str | None) -> bool:
    """Return whether files of the Hugging Face Hub go to huggingface_hub's own cache: nobody has chosen a place."""
    return model_dir is None and not file_name and not os.environ.get(MODEL_DIR_VARIABLE)


def default_directory() -> Path:
    """Return ``RANKLOAD_MODEL_DIR``, else torch.hub's directory for checkpoints."""
    given = os.environ.get(MODEL_DIR_VARIABLE)
    return expanded(given).absolute() if given else torch_hub_directory()


def torch_hub_directory() -> Path:
    """Return torch.hub's directory for checkpoints, honouring torch.hub.set_dir() without importing torch."""
    hub = sys.modules.get("torch.hub")
    return checkpoints_directory(hub.get_dir() if hub is not None else None)


def checked_urls(url: UrlArgument) -> tuple[Url, ...]:
    """Return the URL and its mirrors without duplicates, and check that they can be fetched.

    Raises:
        ArgumentError: a URL cannot be fetched.
    """
    candidates = [url] if isinstance(url, (str, os.PathLike)) else list(url) if isinstance(url, Sequence) else [url]
    if strange := [candidate for candidate in candidates if not isinstance(candidate, (str, os.PathLike))]:
        raise ArgumentError(f"url: expected a URL or a sequence of mirrors, got {type(strange[0]).__name__}")
    urls = tuple(os.fspath(candidate) for candidate in candidates)
    if not urls or not all(urls):
        raise ArgumentError(f"url={[redact(one) for one in urls]}: expected a URL or a sequence of mirrors")
    parsed = tuple(map(Url.parse, dict.fromkeys(urls)))
    for one in parsed:
        if one.scheme not in (None, "http", "https", "file") and one.scheme not in _filesystem_schemes():
            raise ArgumentError(
                f"{one}: scheme {one.scheme!r} is not supported; use http, https, file, a path, or an fsspec scheme "
                "such as s3, gs or hf"
            )
    if len(parsed) > 1 and any(one.local_path for one in parsed):
        raise ArgumentError("mirrors must be remote URLs: a local file is used in place, and needs no mirror")
    return parsed


@functools.cache
def _filesystem_schemes() -> frozenset[str]:
    import fsspec  # slow to import

    # rankload itself handles http and file; the others reach no remote file, or support no ranges
    others = {"http", "https", "file", "local", "ftp", "sftp", "ssh", "smb", "data"}
    return frozenset(fsspec.available_protocols()) - others


#: What a header's value has to be, for messages.
A_HEADER_VALUE = "printable ASCII text; a token that was read from a file may end in a line break: strip() it"


def is_header_value(text: str) -> bool:
    """Return whether a header can have a value."""
    return text.isascii() and text.isprintable() and text == text.strip()


def checked_headers(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Check that headers can be sent, and return them.

    Raises:
        ArgumentError: a header is invalid.
    """
    if not isinstance(headers, Mapping):
        raise ArgumentError(f"headers: expected a mapping of names to values, got {type(headers).__name__}")
    for name, value in headers.items():
        # No message may show a value, because it is a secret, not even the HTTP library's. A name may contain a value.
        match = _TOKEN.match(name) if isinstance(name, str) else None
        is_name = match is not None and match[0] == name
        shown_name = name if is_name else f"{match[0]}…" if match else str(name)[:1]
        if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in (name, value)):
            raise ArgumentError(f"headers[{shown_name!r}]: expected {A_HEADER_VALUE}")
        if not is_name:
            raise ArgumentError(
                f"headers[{shown_name!r}]: expected the name of a header, without blanks, colons or a value"
            )
        if value != value.strip():
            raise ArgumentError(f"headers[{name!r}]: expected a value without blanks at its ends")
    return tuple(headers.items())


def _checked_sha256(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    digest = sha256.lower().removeprefix("sha256:") if isinstance(sha256, str) else ""
    if not is_sha256(digest):
        raise ArgumentError(
            f"sha256={sha256!r}: expected 64 hex digits; for a prefix in the file name pass check_hash=True"
        )
    return digest


def _checked_max_bytes(max_bytes: int) -> int:
    if type(max_bytes) is int and max_bytes > 0:
        return max_bytes
    raise ArgumentError(f"max_bytes={max_bytes!r}: expected a positive whole number of bytes, or None for no limit")


def _promised_prefix(name: str, settings: Settings) -> str:
    shown_name = name.partition("?")[0]  # the rest may be the query of a mistyped URL
    if (prefix := hash_prefix_of(name)) is None:
        raise ArgumentError(
            f"check_hash=True, but the file name {shown_name!r} has no hash prefix (as in resnet50-0676ba61.pth): pass "
            "sha256=, or file_name= with the prefix, or leave check_hash out"
        )
    if len(prefix) < settings.hash_prefix_digits:
        raise ArgumentError(
            f"check_hash=True, but the hash prefix {prefix!r} in the file name {shown_name!r} has only {len(prefix)} "
            "digits: it can be forged, or is no hash at all; expected "
            f"{settings.hash_prefix_digits} or more. Pass sha256=, or, if it is a hash, set "
            f"RANKLOAD_HASH_PREFIX_DIGITS={len(prefix)}"
        )
    warn_of_short_prefix(prefix)
    return prefix


def warn_of_short_prefix(prefix: str) -> None:
    """Warn of a short hash prefix: finding a file with 6 given digits takes only some 16 million tries."""
    if len(prefix) < Settings.hash_prefix_digits:
        _logger.warning("a hash prefix of %d digits proves little: pass the full digest (sha256=)", len(prefix))


def _checked_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ArgumentError(f"{argument}={value!r}: expected one of {', '.join(map(repr, choices))}")
    return value
