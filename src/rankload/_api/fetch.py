"""`dist_fetch`, and the fetch step of the other calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
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
from rankload._fetch.models import FetchRequest, HubWeights, WeightsMemory
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
from rankload._urls import expanded
from rankload.errors import CacheError

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
        return fetch_once(with_weights(request, call), call).path


def prepare_request(
    url: UrlArgument | NamedCheckpoint,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings,
    *,
    scope: Scope = "auto",
    **options: Unpack[RequestOptions],
) -> FetchRequest:
    """Make a request from a public call's arguments. Not collective.

    A name in a table stands for its URL and digest, a repository of the Hugging Face Hub for the weights in it
    (see `with_weights`).

    Raises:
        ArgumentError: an argument is invalid, or a table is malformed.
    """
    named = url if isinstance(url, NamedCheckpoint) else find_checkpoint(url)
    if named is not None:
        url, options = named.urls, with_named(options, named)
    assert not isinstance(url, NamedCheckpoint)

    def request_for(file_url: UrlArgument) -> FetchRequest:
        return replace(make_request(file_url, model_dir, settings, scope=scope, **options), named=named)

    if (repository := _repository_in(url)) is None:
        return request_for(url)
    # the name of the file, with its hash prefix, is not known yet
    nameless: RequestOptions = {**options, "check_hash": False, "file_name": options.get("file_name") or "weights"}
    request = make_request(url, model_dir, settings, scope=scope, **nameless)
    memory = _memory_for(model_dir, options.get("file_name"))
    weights = HubWeights(repository, memory, request_for, check_hash=options.get("check_hash", False))
    return replace(request, named=named, weights=weights)


def with_weights(request: FetchRequest, call: CallContext, *, is_cached: bool = True) -> FetchRequest:
    """Return the request for the file that a repository's weights are; any other request unchanged. Collective.

    Rank 0 asks the Hub: nodes that asked one by one might get different commits.

    Args:
        request: request of a public call.
        call: context of the call.
        is_cached: whether every node will have the file in its cache.

    Raises:
        FetchError: the Hub does not answer, or the repository has no weights.
        RankloadError: any other failure of rank 0.
    """
    weights, identity = request.weights, call.identity
    if weights is None:
        return request
    if identity.rank == 0:
        from rankload._fetch.hub_weights import resolve_weights

        url = resolve_weights(
            weights.repository, weights.memory, call.settings, offline=request.offline, report=call.report
        )
        call.channel.post("weights", {"url": url})
    else:
        url = call.channel.wait_for("weights", from_rank=0)["url"]
        if is_cached and not identity.local_rank:  # for a later call in offline mode
            with suppress(CacheError):
                weights.memory.keep(weights.repository, url)
    return weights.request_for(url)


def fetch_in_this_process(
    url: UrlArgument | NamedCheckpoint,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings | None = None,
    **options: Unpack[RequestOptions],
) -> FetchedFile:
    """Fetch in this process only, with the arguments of the public calls. Not collective; does not import torch."""
    settings = settings or Settings.from_environment()
    request = prepare_request(url, model_dir, settings, scope="process", **options)
    return _fetch_alone(_weights_of_job(request, settings), settings)


def _fetch_alone(request: FetchRequest, settings: Settings) -> FetchedFile:
    with open_single_process_channel() as channel, ExitStack() as stack:
        return fetch_once(request, CallContext(channel, settings, stack))


def _weights_of_job(request: FetchRequest, settings: Settings) -> FetchRequest:
    """Like `with_weights`, but not collective: the processes of the job that share the directory ask the Hub once."""
    if (weights := request.weights) is None:
        return request
    from rankload._fetch.hub_weights import resolve_weights

    def resolve() -> str:
        return resolve_weights(weights.repository, weights.memory, settings, offline=request.offline)

    if request.offline:
        return weights.request_for(resolve())
    from rankload._api.once_per_job import once_per_job

    key = f"weights of {weights.repository}"
    found: str = once_per_job(resolve, key=key, directory=weights.memory.directory, has_lease=False)
    return weights.request_for(found)


def _repository_in(url: UrlArgument) -> HubRepository | None:
    if isinstance(url, (list, tuple)) and len(url) == 1:
        url = url[0]
    return HubRepository.parse(url)


def _memory_for(model_dir: str | os.PathLike[str] | None, file_name: str | None) -> WeightsMemory:
    if uses_hub_cache(model_dir, file_name):
        from rankload._fetch.hub_layout import HubMemory  # imports huggingface_hub

        return HubMemory()
    from rankload._fetch.hub_weights import OwnMemory

    return OwnMemory(default_directory() if model_dir is None else expanded(model_dir).absolute())


def fetch_for_job(
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None,
    settings: Settings,
    **options: Unpack[RequestOptions],
) -> FetchedFile:
    """Fetch like `fetch_in_this_process`. If that fails, the other processes of the job do not try one by one.

    A process that waits for the lease of one whose download fails raises that error.
    """
    request = _weights_of_job(prepare_request(url, model_dir, settings, scope="process", **options), settings)
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
    request = with_weights(request, call, is_cached=delivery != "broadcast")
    file = fetch_at(source, request, call) if delivery == "broadcast" else fetch_once(request, call)
    call.report(Progress("loading", 0, None if file is None else file.size_bytes))
    return file
