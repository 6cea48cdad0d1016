"""`dist_load_state_dict_from_url`: a whole state dict on every rank."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankload._api.call import agree_on_delivery, collective_call
from rankload._api.fetch import fetch_for, fetch_for_job, prepare_request
from rankload._api.tracebacks import short_tracebacks
from rankload._coordination.call_context import CallContext
from rankload._coordination.membership import own_identity
from rankload._coordination.single_process import SingleProcessChannel
from rankload._fetch.checkpoint_table import adapter_for
from rankload._fetch.request import UrlArgument, agreed_arguments
from rankload._formats.sniff import sniff
from rankload._settings import Settings
from rankload._types import Delivery, FetchedFile, Scope, Verify
from rankload.adapt import Adapter

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from rankload._load.device.readers import Limits
    from rankload._load.state_dict.deferred_storages import DeferredStorages

    MapLocation = (
        str | torch.device | dict[str, str] | Callable[[torch.UntypedStorage, str], torch.UntypedStorage] | None
    )


_logger = logging.getLogger("rankload")

#: torch.hub's own words (torch/hub.py, _legacy_zip_load).
_LEGACY_ZIP_WARNING = (
    "Falling back to the old format < 1.6. This support will be deprecated in favor of default zipfile format "
    "introduced in 1.6. Please redo torch.save() to save it in the new zipfile format."
)


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
    """Load the checkpoint at a URL on every rank: downloaded once, verified, the same result or error everywhere.

    **Collective** over the ranks of ``group``, else of the default process group, else of the launcher's job (torchrun,
    mpirun, srun). All these ranks make the call, in the same order. In a single process it works like torch.hub's
    function.

    The first seven arguments are those of torch.hub.load_state_dict_from_url.

    Args:
        url: a URL (http, https, file, or an fsspec scheme such as s3, gs and hf), a plain path, or several mirrors in
            order of preference. If one mirror breaks off, the next one continues, provided that a digest shows that
            both have the same file. Local files are used in place, never copied. If the URL names an index of several
            files (``*.index.json``), those files are fetched, too, into a folder of their own. ``hf://org/name`` stands
            for the weights of that repository; a name in a table for its URL, digest and adapters (see
            `load_pretrained`).
        model_dir: cache directory; default ``torch.hub.get_dir()/checkpoints``. ``~`` is expanded. May differ between
            nodes.
        map_location: as in torch.load, or a per-rank template such as ``"{device}"`` or ``"cuda:{local_rank}"``, also
            as a dict's value. None leaves CPU tensors on the CPU, and puts tensors saved on an accelerator on this
            rank's own device, never another rank's.
        progress: show a progress bar on stderr of the downloading rank. If stderr is not a terminal, print a line at
            the start, every 30 s and at the end.
        check_hash: compare the SHA-256 with the hash prefix in the file name (``name-<prefix>.ext``). A name without a
            hash prefix is an error.
        file_name: name of the file in the cache; default: the URL's file name.
        weights_only: as in torch.load. False lets the file run code: use it only for sources that you trust.
        sha256: full SHA-256 digest of the file: 64 hex digits.
        headers: extra request headers for the first URL's host, e.g. ``{"Authorization": "Bearer …"}``. Mirrors on
            other hosts, and hosts that a redirect leads to, get only the ``User-Agent``. Headers are never logged or
            recorded. GH_TOKEN, GITHUB_TOKEN and HF_TOKEN are sent to their own hosts by default.
        timeout: no-progress deadline in seconds; default 120. A new byte or a new phase is progress. The total time
            has no limit.
        scope: which ranks share one download: ``"job"`` (all nodes share the directory), ``"node"``, ``"process"``, or
            ``"auto"``, which detects the ranks that share the directory. If the cache is on each node's own disk, the
            nodes fetch parts of the file under ``"auto"``, and exchange them over TCP, so that the file ends verified
            in every node's cache, and the origin serves it once. A node fetches more than its part if the other nodes
            are slower than the origin, and everything if they cannot be reached. Under ``"exchange"`` it does neither:
            the origin serves the file once, or the call fails.
        delivery: ``"read"``: every rank maps the file. ``"broadcast"``: one rank fetches the file and sends it from
            node to node, in a chain of TCP connections, into memory that the ranks of a node share. The other nodes
            cache nothing, and no directory need be shared. With ``RANKLOAD_BROADCAST_OVER_GROUP=1`` (not yet tried on
            several GPUs), what all ranks put on accelerators comes over the process group. ``"auto"`` is ``"read"``.
            ``"gather"``: as ``"read"``, but for what all ranks put on accelerators: each rank reads and uploads its
            share, and gets the other shares by all-gathers of the process group, which must have a backend for them.
            ``"auto"`` never chooses it, because it has not been tested on several accelerators yet.
        src: global rank of the source, which fetches and sends the file with ``"broadcast"``, as in
            torch.distributed.broadcast; default: the first rank of the group.
        group: the process group whose ranks make this call.
        offline: never open a socket to an origin; a file that is not cached is an error. Default:
            ``RANKLOAD_OFFLINE``; for hf URLs also ``HF_HUB_OFFLINE`` and ``TRANSFORMERS_OFFLINE``.
        sidecar: require that the file ``<url>.sha256`` at the origin vouches for the file.
        verify: when to hash a cached file: ``"once"`` (again only after the file was touched), ``"always"``, or
            ``"never"``.
        mmap: map the file, so that the ranks of a host share one copy; default: wherever the format allows. False
            gives each rank a private copy.
        adapt: a function to apply to the loaded checkpoint, or several in order, such as those of `rankload.adapt`:
            ``[adapt.unwrap(), adapt.strip_prefix("module.")]``. May differ between ranks.
        max_bytes: the most that this call may download, in bytes. A larger file, or an index whose files are larger
            together, raises a FetchError; the announced length decides, before the first byte is written. No mirror is
            asked then. Cached files do not count. Only the rank that downloads applies this limit. Default:
            ``RANKLOAD_MAX_BYTES``, else no limit.
        refresh: ask the origin once whether a cached file is still current (``If-None-Match``, ``If-Modified-Since``,
            else length and digest), and fetch the new file if not. Without ``refresh``, a cached name is used forever,
            as in torch.hub. ``refresh`` has no effect with ``sha256``, which says which file is wanted.
            ``RANKLOAD_REFRESH=1`` is the same for all calls.

    Returns:
        What torch.load returns: usually ``dict[str, Tensor]``, shapes and dtypes as saved.

    Raises:
        RankloadError: the same error on every rank; the message names the rank and host where it happened.
            `rankload.errors` draws the tree of subclasses. The usual ones are FetchError (an OSError),
            VerificationError and LoadError (RuntimeErrors), and RankLostError (a ConnectionError).
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
            max_bytes=max_bytes,
            refresh=refresh,
        )
        adapter = adapter_for(request.named, adapt)
        chosen, source = agree_on_delivery(call, agreed_arguments(request, "load"), delivery, src)
        location = _resolved(map_location, call)
        file = fetch_for(chosen, request, call, source)
        delivered = _delivered(chosen, file, source, location, mmap, call)
        state_dict = _read(delivered, location, call, weights_only, mmap)
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
    keeps_devices: bool = False,
) -> Any:
    """Load in this process only, since torch.hub's function is often called under ``if rank == 0:``. Not collective.

    Processes that share the directory still download once: the lease sees to that.

    Args:
        url, model_dir, map_location, progress, check_hash, file_name, weights_only: as in torch.hub.
        keeps_devices: ``map_location=None`` puts each tensor on the device that it was saved from, as in torch.
    """
    settings = replace(Settings.from_environment(), hash_prefix_digits=1)  # torch.hub accepts a prefix of any length
    file = fetch_for_job(url, model_dir, settings, progress=progress, check_hash=check_hash, file_name=file_name)
    with SingleProcessChannel(own_identity()) as channel, ExitStack() as stack:
        call = CallContext(channel, settings, stack)
        location = None if keeps_devices and map_location is None else _resolved(map_location, call)
        delivered = _delivered("read", file, 0, location, None, call)
        if sniff(file.path) == "single_member_zip":
            warnings.warn(_LEGACY_ZIP_WARNING, FutureWarning, stacklevel=4)
        return _read(delivered, location, call, weights_only, None)


@dataclass(frozen=True)
class _Delivered:
    """A checkpoint that has arrived at this rank.

    Attributes:
        path: path to load from.
        display_name: the checkpoint's name in messages.
        fill: fills storages on accelerators together with the other ranks; None if each rank fills its own.
    """

    path: Path
    display_name: str
    fill: Callable[[Sequence[DeferredStorages], Limits, str], None] | None = None


def _delivered(
    delivery: Delivery,
    file: FetchedFile | None,
    source: int,
    location: Any,
    mmap: bool | None,
    call: CallContext,
) -> _Delivered:
    """Deliver the checkpoint to this rank. Collective."""
    from rankload._load.node.node_copy import settled  # imports torch
    from rankload._load.node.parts import all_files
    from rankload._load.node.read_ahead import read_ahead
    from rankload._load.node.unpacked_once import with_unpacked

    path = None
    if file is not None:
        path = settled(file.path, file, location, call, mmap=mmap)
    if delivery == "broadcast":
        return _broadcast(path, file, source, location, mmap, call)
    assert file is not None and path is not None
    if delivery == "gather":
        from rankload._load.state_dict.gathered_storages import gather_storages

        return _Delivered(with_unpacked(path, call), str(file.path), partial(gather_storages, call))
    _logger.debug("rank %d: delivery='read': the ranks of a node share the file's pages", call.identity.rank)
    read_ahead(all_files(path), call.channel, call.settings.progress_seconds)
    return _Delivered(with_unpacked(path, call), str(file.path))


def _broadcast(
    path: Path | None,
    file: FetchedFile | None,
    source: int,
    location: Any,
    mmap: bool | None,
    call: CallContext,
) -> _Delivered:
    from rankload._load.broadcast.whole_file import broadcast_files
    from rankload._load.node.unpacked_once import with_unpacked

    if call.settings.broadcast_over_group:
        from rankload._load.broadcast.storages import StorageBroadcast

        if over_group := StorageBroadcast.agree(path, file, source, location, call, mmap=mmap):
            return _Delivered(*over_group.bring_headers(path, file), over_group.fill)
    path, display_name = broadcast_files(path, file, source, call)
    return _Delivered(with_unpacked(path, call), display_name)


def _resolved(map_location: MapLocation, call: CallContext) -> Any:
    from rankload._load.device.devices import resolve_map_location  # imports torch

    return resolve_map_location(map_location, call.identity, call.group)


def _read(delivered: _Delivered, location: Any, call: CallContext, weights_only: bool, mmap: bool | None) -> Any:
    from rankload._load.device.readers import Limits
    from rankload._load.state_dict.read_checkpoint import read_checkpoint  # imports torch

    limits = Limits.of(call.identity, call.settings)
    empty: list[DeferredStorages] = []
    result = read_checkpoint(
        delivered.path,
        location,
        weights_only=weights_only,
        mmap=mmap,
        limits=limits,
        check_cancelled=call.report_loading,
        display_name=delivered.display_name,
        fill=empty.append if delivered.fill is not None else None,
    )
    if delivered.fill is not None:
        delivered.fill(empty, limits, delivered.display_name)
    return result
