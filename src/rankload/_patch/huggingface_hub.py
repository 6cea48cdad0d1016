"""What takes the place of huggingface_hub's downloads: its own functions, once per job.

One process of the job runs huggingface_hub's function, with its requests, its cache and its layout. The others get the
path that it returned, without a request: 512 ranks that each ask for a file's ETag are refused by the Hub (429).
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rankload._api.once_per_job import ErrorCodec, once_per_job
from rankload._urls import redact, redact_text, url_key

_logger = logging.getLogger("rankload")

#: Modules and functions that are replaced.
FUNCTIONS = {
    "huggingface_hub.file_download": "hf_hub_download",
    "huggingface_hub._snapshot_download": "snapshot_download",
}

#: Parameters that decide what is downloaded, and where to. A function without the first ones is left alone.
_REQUIRED = ("repo_id", "revision", "repo_type", "cache_dir", "local_dir", "force_download", "local_files_only")
_OTHERS = ("filename", "subfolder", "allow_patterns", "ignore_patterns")

KNOWN_VERSIONS = "0.36 to 2.4"


def once(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the replacement of a function of huggingface_hub; None for one that is not known."""
    parameters = [*inspect.signature(original).parameters]
    if not set(_REQUIRED) <= set(parameters):
        _logger.warning(
            "%s.%s of this version of huggingface_hub is left alone; known are the versions %s",
            original.__module__, original.__name__, KNOWN_VERSIONS,
        )  # fmt: skip
        return None

    @functools.wraps(original)
    def download(*args: Any, **kwargs: Any) -> Any:
        # not signature.bind(): callers pass arguments of other versions, which decorators of huggingface_hub drop
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        constants = sys.modules["huggingface_hub.constants"]
        if arguments.get("local_files_only") or arguments.get("dry_run") or constants.HF_HUB_OFFLINE:
            return original(*args, **kwargs)  # makes no request, or returns no path
        deciding = {name: _text(arguments.get(name)) for name in (*_REQUIRED, *_OTHERS)}
        local_dir, cache_dir = arguments.get("local_dir"), arguments.get("cache_dir") or constants.HF_HUB_CACHE
        # directories of huggingface_hub's own, which its scan of the cache leaves out
        directory = Path(cache_dir, ".locks") if local_dir is None else Path(local_dir, ".cache", "huggingface")
        return once_per_job(
            lambda: original(*args, **kwargs),
            key=f"{original.__name__} {_endpoint_key(arguments.get('endpoint'))} {json.dumps(deciding)}",
            directory=directory.expanduser().absolute(),
            is_usable=os.path.exists,
            errors=_ERRORS,
            has_lease=False,
        )

    return download


def resolved_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the replacement of HfApi.resolve_revision, with which transformers begins: a request for each rank."""

    @functools.wraps(original)
    def resolve_revision(
        self: Any,
        repo_id: str,
        *,
        repo_type: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        **others: Any,
    ) -> Any:
        def resolve() -> Any:
            return original(
                self,
                repo_id,
                repo_type=repo_type,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                **others,
            )

        resolved_type = sys.modules["huggingface_hub._revision"].ResolvedRevision
        constants = sys.modules["huggingface_hub.constants"]
        if local_files_only or constants.HF_HUB_OFFLINE or isinstance(revision, resolved_type) or others:
            return resolve()
        place = [repo_id, repo_type, revision, str(cache_dir)]
        commit = once_per_job(
            lambda: resolve().resolved,
            key=f"resolve_revision {_endpoint_key(self.endpoint)} {json.dumps(place)}",
            directory=Path(cache_dir or constants.HF_HUB_CACHE, ".locks").expanduser().absolute(),
            errors=_ERRORS,
            has_lease=False,
        )
        return resolved_type(resolved=commit, initial=revision, repo_id=repo_id, repo_type=repo_type)

    return resolve_revision


def keep_inner_calls(module: ModuleType, original: Callable[..., Any]) -> None:
    """Let snapshot_download download its files by the original function: it is once per job as a whole."""
    if hasattr(module, "hf_hub_download"):
        vars(module)["hf_hub_download"] = original


def _endpoint_key(endpoint: str | None) -> str:
    """Return a digest: stamps are readable, and an endpoint may have a password."""
    return url_key(endpoint or os.environ.get("HF_ENDPOINT", ""))[:16]


def _text(value: Any) -> Any:
    resolved = getattr(value, "resolved", None)  # of a ResolvedRevision
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return value if value is None or isinstance(value, bool) else f"{value}@{resolved}" if resolved else str(value)


def _encode(error: Exception) -> dict[str, Any] | None:
    """Return an error that says what the Hub has; None for others, such as a connection that failed."""
    errors = sys.modules["huggingface_hub.errors"]
    response = getattr(error, "response", None)
    if getattr(errors, type(error).__name__, None) is not type(error) or response is None:
        return None
    return {
        "type": type(error).__name__,
        "message": "\n".join(map(redact_text, str(error.args[0] if error.args else error).split("\n"))),
        "status": int(response.status_code),
        "url": redact(str(response.url)).partition("?")[0],  # a query or a password would let readers of the stamp in
    }


def _decode(wire: dict[str, Any]) -> Exception:
    errors = sys.modules["huggingface_hub.errors"]
    response_type = errors.Response
    client = sys.modules[response_type.__module__.partition(".")[0]]
    if hasattr(client, "Client"):  # httpx, or what follows it
        response = response_type(wire["status"], request=client.Request("HEAD", wire["url"]))
    else:  # requests
        response = response_type()
        response.status_code, response.url = wire["status"], wire["url"]
    error: Exception = getattr(errors, wire["type"])(wire["message"], response=response)
    return error


_ERRORS = ErrorCodec(_encode, _decode, max_age_seconds=math.inf)  # what the Hub said
