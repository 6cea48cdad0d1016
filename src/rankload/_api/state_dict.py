"""`dist_load_state_dict_from_url`: a whole state dict on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankload._api.call import agree_on_delivery, collective_call
from rankload._api.fetch import fetch_for, fetch_in_this_process
from rankload._api.tracebacks import short_tracebacks
from rankload._coordination.call_context import CallContext
from rankload._coordination.membership import own_identity
from rankload._coordination.single_process import SingleProcessChannel
from rankload._fetch.request import UrlArgument, agreed_arguments, make_request
from rankload._settings import Settings
from rankload._types import Delivery, FetchedFile, Scope, Verify
from rankload.adapt import Adapter, as_adapter

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    MapLocation = (
        str | torch.device | dict[str, str] | Callable[[torch.UntypedStorage, str], torch.UntypedStorage] | None
    )


_logger = logging.getLogger("rankload")


@short_tracebacks
def dist_load_state_dict_from_url(
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None = None,
    map_location: MapLocation = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
    weights_only: bool = True,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    scope: Scope = "auto",
    delivery: Delivery = "auto",
    src: int | None = None,
    group: ProcessGroup | None = None,
    offline: bool | None = None,
    sidecar: bool = False,
    verify: Verify = "once",
    mmap: bool | None = None,
    adapt: Adapter | Sequence[Adapter] | None = None,
    max_bytes: int | None = None,
    refresh: bool = False,
) -> dict[str, Any]:
    """Load the checkpoint at a URL into every rank: downloaded once, verified, the same result or error everywhere.

    **Collective** over the ranks of ``group``, else of the default process group, else of the launcher's job (torchrun,
    mpirun, srun): all of them make the call, in the same order. In a single process it is torch.hub's function.

    The first seven arguments are torch.hub.load_state_dict_from_url's.

    Args:
        url: URL (http, https, file, or a scheme of fsspec's such as s3, gs and hf), a plain path, or several mirrors
            in order of preference: where one breaks off, the next goes on, if a digest tells that it has the same
            file. Local files are used in place, never copied. Of an index of several files (``*.index.json``) these
            are fetched, too, into a folder of their own.
        model_dir: cache directory; default ``torch.hub.get_dir()/checkpoints``. ``~`` is expanded. May differ between
            nodes.
        map_location: as in torch.load, and also with per-rank templates, ``"{device}"`` or ``"cuda:{local_rank}"``, as
            dict values too. None: CPU tensors stay on the CPU; tensors saved on an accelerator come to this rank's
            own device, never another rank's.
        progress: show a bar on stderr of the downloading rank, or, where that is no terminal, a line at the start,
            every 30 s and at the end.
        check_hash: compare the SHA-256 with the hash prefix in the file name (``name-<prefix>.ext``); a name
            without one is an error.
        file_name: the file's name in the cache; default: the URL's.
        weights_only: as in torch.load. False lets the file run code: only for sources you trust.
        sha256: the full digest, 64 hex digits.
        headers: extra request headers, e.g. ``{"Authorization": "Bearer …"}``, for the first URL's host; mirrors on
            other hosts, and hosts that it redirects to, get the ``User-Agent`` alone. Never logged or recorded.
            GH_TOKEN, GITHUB_TOKEN and HF_TOKEN are sent to their own hosts without being asked for.
        timeout: deadline in seconds on *no progress* (no byte, no new phase); default 120. Never a limit on the
            total time.
        scope: who shares one download: ``"job"`` (a directory shared by all nodes), ``"node"``, ``"process"``, or
            ``"auto"``, which finds out.
        delivery: ``"read"``: every rank maps the file. ``"broadcast"``: one rank fetches it, and it travels on from
            node to node, over TCP in a chain, into memory that the ranks of a node share; nothing is cached on the
            other nodes, and no directory need be shared. ``"auto"`` is ``"read"``; ``"gather"`` is for
            `dist_load_into`.
        src: the rank that fetches and sends with ``"broadcast"``, a global one as in torch.distributed.broadcast;
            default: the first of the group.
        group: the process group whose ranks make this call.
        offline: never open a socket to an origin; what is not cached is an error. Default: ``RANKLOAD_OFFLINE``; for
            hf URLs ``HF_HUB_OFFLINE`` and ``TRANSFORMERS_OFFLINE``, too.
        sidecar: the file ``<url>.sha256`` at the origin must vouch for the file.
        verify: when to hash a cached file: ``"once"`` (again only when it was touched), ``"always"``, or ``"never"``.
        mmap: map the file, so that the ranks of a host share one copy; default: wherever the format allows. False
            gives each rank a private copy.
        adapt: applied to what was loaded: a function, or several in order, such as those of `rankload.adapt`:
            ``[adapt.unwrap(), adapt.strip_prefix("module.")]``. May differ between ranks.
        max_bytes: the most that this call may download, in bytes: a file that is larger, or an index with parts that
            are together, is refused with a FetchError, by its announced length before the first byte is written. No
            mirror is asked then. What is cached does not count. Only the rank that downloads applies it. Default:
            ``RANKLOAD_MAX_BYTES``, else no limit.
        refresh: ask the origin once whether a cached file is still its file (``If-None-Match``, ``If-Modified-Since``,
            else length and digest), and fetch the new one if not. Without it, as in torch.hub, a cached name is used
            forever. Not with ``sha256``, which says which file is wanted. Also ``RANKLOAD_REFRESH=1``.

    Returns:
        What torch.load returns: usually ``dict[str, Tensor]``, shapes and dtypes as saved.

    Raises:
        RankloadError: on every rank the same, naming the rank and host where it happened. The subclasses are drawn in
            `rankload.errors`; the usual ones are FetchError (an OSError), VerificationError and LoadError
            (RuntimeErrors), RankLostError (a ConnectionError).
    """
    with collective_call(group, timeout) as call:
        adapter = as_adapter(adapt)
        request = make_request(
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
            max_bytes=max_bytes,
            refresh=refresh,
        )
        chosen, source = agree_on_delivery(call, agreed_arguments(request, "load"), delivery, src)
        location = _resolved(map_location, call)
        file = fetch_for(chosen, request, call, source)
        path, display_name = _delivered(chosen, file, source, location, mmap, call)
        state_dict = _read(path, display_name, location, call, weights_only, mmap)
        return adapter(state_dict)  # type: ignore[no-any-return]


def load_in_this_process(
    url: str,
    model_dir: str | os.PathLike[str] | None,
    map_location: MapLocation,
    *,
    progress: bool,
    check_hash: bool,
    file_name: str | None,
    weights_only: bool,
) -> Any:
    """Load without the other ranks: torch.hub's callers often stand under ``if rank == 0:``. Not collective.

    Processes that share the directory still download once, through the lease.
    """
    settings = replace(Settings.from_environment(), hash_prefix_digits=1)  # torch.hub takes any prefix for a hash
    file = fetch_in_this_process(
        url, model_dir, settings, progress=progress, check_hash=check_hash, file_name=file_name
    )
    with SingleProcessChannel(own_identity()) as channel, ExitStack() as stack:
        call = CallContext(channel, settings, stack=stack)
        location = _resolved(map_location, call)
        path, display_name = _delivered("read", file, 0, location, None, call)
        return _read(path, display_name, location, call, weights_only, None)


def _delivered(
    delivery: Delivery,
    file: FetchedFile | None,
    source: int,
    location: Any,
    mmap: bool | None,
    call: CallContext,
) -> tuple[Path, str]:
    """Return where this rank is to load from, and what messages call it. Collective."""
    from rankload._load.node.node_copy import settled  # imports torch
    from rankload._load.node.parts import all_files
    from rankload._load.node.read_ahead import read_ahead
    from rankload._load.node.unpacked_once import with_unpacked

    path = None
    if file is not None:
        path = settled(file.path, file, location, call, mmap=mmap)
    if delivery == "broadcast":
        from rankload._load.broadcast.whole_file import broadcast_files

        path, display_name = broadcast_files(path, file, source, call)
        return with_unpacked(path, call), display_name
    assert file is not None and path is not None
    _logger.debug("rank %d: delivery='read': the ranks of a node share the file's pages", call.identity.rank)
    read_ahead(all_files(path), call.channel, call.settings.progress_seconds)
    return with_unpacked(path, call), str(file.path)


def _resolved(map_location: MapLocation, call: CallContext) -> Any:
    from rankload._load.device.devices import resolve_map_location  # imports torch

    return resolve_map_location(map_location, call.identity, call.group)


def _read(
    path: Path,
    display_name: str,
    location: Any,
    call: CallContext,
    weights_only: bool,
    mmap: bool | None,
) -> Any:
    from rankload._load.device.readers import Limits
    from rankload._load.state_dict.read_checkpoint import read_checkpoint  # imports torch

    return read_checkpoint(
        path,
        location,
        weights_only=weights_only,
        mmap=mmap,
        limits=Limits.of(call.identity, call.settings),
        check_cancelled=call.report_loading,
        display_name=display_name,
    )
