"""`dist_load_into`: a checkpoint from a URL into a module and its optimizer, on every rank."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rankload._api.call import agree_on_delivery, collective_call
from rankload._api.fetch import fetch_for, prepare_request
from rankload._api.tracebacks import short_tracebacks
from rankload._fetch.checkpoint_table import adapter_for
from rankload._fetch.request import UrlArgument, agreed_arguments
from rankload._load.delivery.select import open_strategy
from rankload._load.delivery.strategy import LoadPlan
from rankload._load.device.devices import own_device
from rankload._load.module.content import open_content
from rankload._load.module.lazy_modules import uninitialised_again_on_error
from rankload._load.module.lazy_tensor import LazyTensor
from rankload._load.module.module_load import left_on_meta, plan_load, prepare_load, run_post_hooks
from rankload._load.module.optimizer_load import plan_optimizer_load, prepare_optimizer_load
from rankload._load.module.own_code import looks_at_state_dict
from rankload._load.module.slots import bare, device_of, is_distributed, tensor_slots
from rankload._load.node.node_copy import read_in_place, settled
from rankload._load.report import LoadReport
from rankload._text import printable
from rankload._types import Delivery, Scope, Verify
from rankload.adapt import Adapter, is_lazy, unwrap
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


_logger = logging.getLogger("rankload")


@short_tracebacks
def dist_load_into(
    module: nn.Module | tuple[nn.Module, Optimizer],
    url: UrlArgument,
    model_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
    weights_only: bool = True,
    *,
    strict: bool = True,
    assign: bool | None = None,
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
) -> LoadReport:
    """Load the checkpoint at a URL into a module on every rank. Each rank reads only the bytes of its own parameters.

    **Collective** over the ranks of ``group``, else of the default process group, else of the launcher's job, like
    `dist_load_state_dict_from_url`. No tensor is written before all ranks have checked that everything fits. If the
    check fails on one rank, all ranks raise. (Extra state, and whatever a module's own hooks compute, is set during
    that check. A module's own post-hooks may change the missing and unexpected names. If a module has any, those names
    are judged after them, when the tensors are written, as ``load_state_dict`` does.)

    The module may be plain, wrapped in DistributedDataParallel or by torch.compile (the names are then those of the
    inner module), sharded by ``fully_shard`` (FSDP2), or tensor-parallel, on any mesh. The module's hooks, ``_version``
    and extra state work as in ``load_state_dict``, and see in the state dict exactly what torch.load returns. There is
    one limit: code after a module's own ``super()._load_from_state_dict(…)`` runs before the tensors are loaded. Its
    post-hooks run after that.

    Tensors are converted to the dtypes and devices of the module's tensors. A tensor on the meta device is materialised
    on the device of the rest of the module, else on this rank's own device. On the CPU it becomes a view of the mapped
    file, of which the ranks of a host share one copy. Tied parameters stay tied; the file may contain only one of their
    names.

    Arguments that are not listed here are those of `dist_load_state_dict_from_url`.

    Args:
        module: the module to load into: the same on all ranks, except for its sharding. ``(module, optimizer)`` loads
            both from a training checkpoint such as
            ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``, under any of the usual names. The
            optimizer's state may be keyed by numbers or by names, as in ``torch.distributed.checkpoint.state_dict``.
            For sharded parameters, each rank reads its part of the state.
        url: as in `dist_load_state_dict_from_url`.
        timeout: no-progress deadline in seconds, as in `dist_load_state_dict_from_url`.
        weights_only: as in torch.load, for everything that torch.load builds: files without an index, and objects that
            the module, the optimizer or ``report.remainder`` needs. Nothing else is built, so nothing else can run
            code.
        strict: raise if names are missing or unexpected. Shapes must fit in any case.
        assign: replace the module's tensors by the checkpoint's, with their dtypes, instead of writing into them, as
            ``load_state_dict(assign=True)`` does. On the CPU this makes no copy. Create the optimizer afterwards.
            None replaces only tensors on the meta device. As in torch, None replaces all tensors if the saved state
            dict had been loaded with ``assign=True``.
        delivery: as in `dist_load_state_dict_from_url`. With ``"gather"``, ranks share the reading of what they hold
            in common, so that each byte of the file is read once per job: whole tensors among all ranks; the parts of a
            DTensor among the ranks over which its mesh replicates them (HSDP, tensor with data parallel); of an
            optimizer's state, what is sharded. A tensor-parallel mesh that is a slice of a larger one is replicated
            over the larger one's other dimensions (from torch 2.10 on), unless the ranks there want something else, as
            the stages of a pipeline do. Each rank reads and uploads its share, and gets the other shares by all-gathers
            of the mesh's process groups. They must have a backend for the module's device. What no other rank holds is
            read by its owner. A device holds two buckets beyond its own tensors, each of
            ``max(32 MiB, 4 MiB × ranks)``, at most 512 MiB.
            With ``"broadcast"``, each rank takes its own bytes out of the stream, which comes over TCP, or over the
            process group with ``RANKLOAD_BROADCAST_OVER_GROUP=1`` (not yet tried on several GPUs). A rank holds 8 MiB
            beyond its own tensors, and up to 64 MiB of tensors that are too small to be sent one by one. Each receiver
            gets the whole file first if the source itself has to load the whole file: if the file has no index, if an
            ``adapt`` of your own or the module's own code sees tensors, or if the remainder holds large ones.
        mmap: False makes private copies of tensors that would be views of the mapped file.
        adapt: as in `dist_load_state_dict_from_url`. The functions of `rankload.adapt` are applied to the index, before
            a byte is read. Your own functions get the mapped tensors. With an optimizer, the functions are applied
            to the whole checkpoint, and return the module's part; default: ``adapt.unwrap()``.

    Returns:
        A `LoadReport`, which unpacks into ``missing_keys, unexpected_keys``. With an optimizer, ``report.remainder`` is
        the rest of the checkpoint on every rank, such as ``{"epoch": 3, "scheduler": {…}, "rng": …}``: as torch.load
        returns it, with the nesting that it was saved with. Each rank holds the remainder's tensors in memory.

    Raises:
        LoadError: the checkpoint does not fit; the message lists the misfits, and what may help.
        RankloadError: any other failure; the same error on every rank.
    """
    phases: dict[str, float] = {}
    with collective_call(group, timeout) as call:
        target, optimizer = _checked_targets(module, assign)
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
        if optimizer is not None and adapt is None and not (request.named and request.named.adapt):
            adapt = unwrap()
        adapter = adapter_for(request.named, adapt)
        arguments = agreed_arguments(request, "load_into")
        chosen, sender = agree_on_delivery(call, arguments, delivery, src)
        with _timed(phases, "fetch"):
            file = fetch_for(chosen, request, call, sender)
        with _timed(phases, "check"), uninitialised_again_on_error(target):
            inner, _ = bare(target)
            device = functools.cache(lambda: device_of(inner) or own_device(call.identity, call.group))
            path = file.path if file is not None else None
            may_map = True
            if file is not None and _leaves_views(inner, assign, adapter):
                location = str(device()) if _has_meta(inner) else "cpu"
                path = settled(file.path, file, location, call, mmap=mmap)
            elif file is not None:
                path, may_map = read_in_place(file.path, file, call, mmap=mmap)
            strategy = open_strategy(chosen, path, file, sender, call)
            if file is not None:
                strategy.path, strategy.files.display_name = file.path, printable(str(file.path))
                strategy.files.may_map = may_map
            content = open_content(
                strategy.files,
                adapter,
                target,
                with_optimizer=optimizer is not None,
                assign=assign,
                weights_only=weights_only,
                mmap=mmap,
            )
            load = plan_load(
                target,
                content,
                strict=strict,
                assign=assign,
                display_name=strategy.files.display_name,
                may_replace=optimizer is None,
            )
            if load.warning and call.identity.rank == 0:
                _logger.warning("%s", load.warning)
            others: list[tuple[LazyTensor, torch.Tensor | None]] = []
            if optimizer is not None:
                optimizer_load = plan_optimizer_load(optimizer, content.whole, target, strategy.files.display_name)
                others = optimizer_load.wanted
            strategy.prepare(LoadPlan(content.index, load.assignments, others, device))
            call.channel.meet("checked")
            strategy.on_agreement()
        with _timed(phases, "fill"), torch.no_grad():
            may_share = strategy.may_share and strategy.files.may_map and mmap is not False
            prepared = [prepare_load(load, device, may_share=may_share)]
            if optimizer is not None:
                prepared.append(prepare_optimizer_load(optimizer_load))
            copies = [copy for part in prepared for copy in part.copies]
            bytes_read = sum(part.bytes_mapped for part in prepared)
            bytes_read += strategy.execute(copies, call.report_loading)
            for part in prepared:
                part.finish()
        run_post_hooks(load)
        keys = (load.missing_keys, load.unexpected_keys)
        return LoadReport.make(keys, strategy, file, bytes_read, phases, left_on_meta(load), content.remainder)


def _is_fsdp1(module: nn.Module) -> bool:
    """Return whether a module is a FullyShardedDataParallel. The check is by name, as importing the class is slow."""
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def _has_meta(module: nn.Module) -> bool:
    return any(slot.tensor.is_meta for slot in tensor_slots(module))


def _leaves_views(module: nn.Module, assign: bool | None, adapter: Adapter) -> bool:
    """Return whether the module's tensors may become views of the checkpoint, or the caller's code may get such views.

    Shards never become views: each rank reads its own.
    """
    whole = [slot.tensor for slot in tensor_slots(module) if not is_distributed(slot.tensor)]
    if not is_lazy(adapter) or looks_at_state_dict(module):
        return True
    return (bool(assign) and bool(whole)) or any(tensor.is_meta for tensor in whole)


def _checked_targets(module: Any, assign: bool | None) -> tuple[nn.Module, Optimizer | None]:
    target, *optimizers = module if isinstance(module, (tuple, list)) and module else (module,)
    is_module = hasattr(target, "load_state_dict") and hasattr(target, "named_modules")
    are_optimizers = all(hasattr(optimizer, "param_groups") for optimizer in optimizers)
    if not is_module or not are_optimizers or len(optimizers) > 1:
        given = ", ".join(type(part).__name__ for part in (target, *optimizers))
        raise ArgumentError(f"dist_load_into({given}, …): expected a torch.nn.Module, or (module, optimizer)")
    if any(map(_is_fsdp1, target.modules())):
        raise ArgumentError(
            "dist_load_into: FullyShardedDataParallel flattens its parameters and frees them: load into the module "
            "before it is wrapped, or shard it with torch.distributed.fsdp.fully_shard"
        )
    if optimizers and (assign or any(slot.tensor.is_meta for slot in tensor_slots(target))):
        raise ArgumentError(
            "dist_load_into((module, optimizer), …): this call would replace parameters (those on the meta device, or "
            "all with assign=True), and the optimizer would keep the old ones; materialise the module first "
            "(module.to_empty), and do not pass assign=True"
        )
    return target, optimizers[0] if optimizers else None


@contextmanager
def _timed(phases: dict[str, float], phase: str) -> Iterator[None]:
    began_at = time.perf_counter()
    yield
    phases[phase] = time.perf_counter() - began_at
