"""`dist_fetch`, and the fetch step of the other calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from rankload._api.call import collective_call
from rankload._api.tracebacks import short_tracebacks
from rankload._coordination.call_context import CallContext
from rankload._coordination.membership import open_single_process_channel
from rankload._fetch.checkpoint_table import NamedCheckpoint, find_checkpoint
from rankload._fetch.fetch_once import fetch_at, fetch_once
from rankload._fetch.hub_names import HubRepository
from rankload._fetch.models import FetchRequest
from rankload._fetch.offline import is_switched_off
from rankload._fetch.request import (
    RequestOptions,
    UrlArgument,
    agreed_arguments,
    default_directory,
    make_request,
    uses_hub_cache,
    with_named,
)
from rankload._settings import Settings
from rankload._types import Delivery, FetchedFile, Progress, Scope, Verify
from rankload._urls import Url, expanded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@short_tracebacks
def dist_fetch(
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    scope: Scope = "auto",
    group: ProcessGroup | None = None,
    offline: bool | None = None,
    sidecar: bool = False,
    verify: Verify = "once",
    max_bytes: int | None = None,
    refresh: bool = False,
) -> Path:
    """Fetch and verify a file once for all ranks, and return its path in this node's cache. Loads no tensors.

    **Collective**, with the arguments and errors of `dist_load_state_dict_from_url`. The file need not be a checkpoint.
    In a single process this call does not import torch; use it to prefetch on a login node.
    """
    with collective_call(group, timeout) as call:
        request = prepare_request(
            url,
            model_dir,
            call.settings,
            check_hash=check_hash,
            file_name=file_name,
            progress=progress,
            sha256=sha256,
            headers=headers,
            scope=scope,
            sidecar=sidecar,
            verify=verify,
            offline=offline,
            must_be_checkpoint=False,
            max_bytes=max_bytes,
            refresh=refresh,
        )
        call.channel.agree(agreed_arguments(request, "fetch"))
        return fetch_once(request, call).path


def prepare_request(
    url: UrlArgument | NamedCheckpoint,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings,
    *,
    scope: Scope = "auto",
    **options: Unpack[RequestOptions],
) -> FetchRequest:
    """Make a request from a public call's arguments. Not collective.

    A name in a table stands for its URL and digest, a repository of the Hugging Face Hub for the weights in it.

    Raises:
        ArgumentError: an argument is invalid, or a table is malformed.
        FetchError: the Hub does not say what the repository has.
    """
    named = url if isinstance(url, NamedCheckpoint) else find_checkpoint(url)
    if named is not None:
        url, options = named.urls, with_named(options, named)
    assert not isinstance(url, NamedCheckpoint)
    url = weights_url(url, model_dir, settings, offline=options.get("offline"), file_name=options.get("file_name"))
    request = make_request(url, model_dir, settings, scope=scope, **options)
    return replace(request, named=named)


def fetch_in_this_process(
    url: UrlArgument | NamedCheckpoint,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings | None = None,
    **options: Unpack[RequestOptions],
) -> FetchedFile:
    """Fetch in this process only, with the arguments of the public calls. Not collective; does not import torch."""
    settings = settings or Settings.from_environment()
    return _fetch_alone(prepare_request(url, model_dir, settings, scope="process", **options), settings)


def _fetch_alone(request: FetchRequest, settings: Settings) -> FetchedFile:
    with open_single_process_channel() as channel, ExitStack() as stack:
        return fetch_once(request, CallContext(channel, settings, stack))


def weights_url(
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings,
    *,
    offline: bool | None = None,
    file_name: str | None = None,
) -> UrlArgument:
    """Return the URL of the weights in a repository of the Hugging Face Hub; any other argument unchanged.

    Not collective: the ranks of a job that share the cache directory ask the Hub once.

    Args:
        url: argument of a public call; ``hf://org/name[@revision][?variant=…]`` is a repository.
        model_dir, offline, file_name: arguments of the public call.
        settings: settings of the call.
    """
    if isinstance(url, (list, tuple)) and len(url) == 1:
        url = url[0]
    if not isinstance(url, str) or not url.startswith("hf://"):
        return url
    repository = HubRepository.parse(url)
    if repository is None:
        return url
    from rankload._fetch.hub_cache import HubMemory, cache_directory  # imports huggingface_hub
    from rankload._fetch.hub_weights import Memory, OwnMemory, resolve_weights

    memory: Memory
    if uses_hub_cache(model_dir, file_name):
        memory, directory = HubMemory(), cache_directory() / ".locks"  # huggingface_hub's scan leaves it out
    else:
        directory = default_directory() if model_dir is None else expanded(model_dir).absolute()
        memory = OwnMemory(directory)
    if (settings.offline if offline is None else offline) or is_switched_off(Url.parse(url)):
        return resolve_weights(repository, memory, settings, offline=True)
    from rankload._api.once_per_job import once_per_job

    found: str = once_per_job(
        lambda: resolve_weights(repository, memory, settings, offline=False),
        key=f"weights of {url}",
        directory=directory,
        has_lease=False,
    )
    return found


def fetch_for_job(
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings,
    **options: Unpack[RequestOptions],
) -> FetchedFile:
    """Fetch like `fetch_in_this_process`. If that fails, the other processes of the job do not try one by one.

    A process that waits for the lease of one whose download fails raises that error.
    """
    request = prepare_request(url, model_dir, settings, scope="process", **options)
    if request.url.local_path is None and not (request.directory / request.file_name).exists():
        from rankload._api.once_per_job import once_per_job

        key = f"fetch {request.url.key} {request.file_name} {request.digest or ''}"
        once_per_job(
            lambda: str(_fetch_alone(request, settings).path), key=key, directory=request.directory, has_lease=False
        )
    return _fetch_alone(request, settings)


def fetch_for(delivery: Delivery, request: FetchRequest, call: CallContext, source: int) -> FetchedFile | None:
    """Fetch the file as the delivery needs it. Collective.

    Returns:
        The file; None with ``delivery="broadcast"`` on every rank but the source.
    """
    file = fetch_at(source, request, call) if delivery == "broadcast" else fetch_once(request, call)
    call.report(Progress("loading", 0, None if file is None else file.size_bytes))
    return file
