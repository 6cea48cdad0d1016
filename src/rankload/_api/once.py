"""`dist_once` and `local_once`: run any preparation once per job, or once per directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rankload._api.call import collective_call
from rankload._api.tracebacks import short_tracebacks
from rankload._coordination.call_context import CallContext
from rankload._coordination.membership import open_single_process_channel
from rankload._fetch.request import default_directory
from rankload._fetch.run_once import Task, run_once
from rankload._settings import Settings
from rankload._types import Scope
from rankload._urls import expanded
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@short_tracebacks
def dist_once(
    function: Callable[..., Any],
    *,
    key: str,
    directory: str | os.PathLike[str] | None = None,
    scope: Scope = "auto",
    redo: bool = False,
    timeout: float | None = None,
    group: ProcessGroup | None = None,
) -> Any:
    """Run a function once for all ranks that share a directory; return its value, or raise its error, on every rank.

    For what every job prepares before it trains: unpacking a dataset, building an extension, a ``snapshot_download``, a
    tokenizer. A stamp in the directory records the value, so that the next job does not run the function again. Jobs
    that start at the same time share one run through a lease: while another job's process lives and runs the function,
    this call waits for it, without a deadline.

    **Collective** over the ranks of ``group``, else of the default process group, else of the launcher's job, like
    `rankload.dist_load_state_dict_from_url`. Ranks on nodes with directories of their own run the function once for
    each directory.

    The function must be idempotent: a killed run is started again, and where no lease can be had, two jobs may run it
    at the same time. It must make no collective call: only one rank runs it. A stamp of another user, except root, does
    not count.

    Args:
        function: called without arguments, or, if ``timeout`` is given, with one: a function to call after each step.
            Returns a Path, or what JSON can hold, of at most 60 KiB.
        key: name of the preparation, with all that it depends on: ``"imagenet-v2"``. The same on all ranks.
        directory: keeps the stamp, and decides which ranks share one run; default: the cache directory. Usually the
            directory that the function fills.
        scope: which ranks share one run: ``"job"``, ``"node"``, ``"process"``, or ``"auto"``, which finds out which
            ranks share the directory.
        redo: run the function even if it was run before, once for this call.
        timeout: no-progress deadline in seconds between two steps of the function. Without one, the function may take
            as long as its process lives.
        group: process group of the ranks that make this call.

    Returns:
        The function's value, from this run or an earlier one. If the value is a path that no longer exists, the
        function runs again.

    Raises:
        ArgumentError: the function returned something else than a Path or JSON.
        RankloadError: any other failure, the same on every rank. An error of the function itself is a RankFailedError
            that names it.
    """
    with collective_call(group, timeout) as call:
        task = _task(function, key, directory, scope, redo=redo, has_deadline=timeout is not None)
        call.channel.agree({"call": "once", "key": key, "scope": scope, "redo": redo})
        return run_once(task, call)


@short_tracebacks
def local_once(
    function: Callable[[], Any], *, key: str, directory: str | os.PathLike[str] | None = None, redo: bool = False
) -> Any:
    """Run a function once for all processes that share a directory; return its value. Not collective.

    The first process that comes runs the function; others wait for its stamp. They need not belong to one job, and no
    rank waits for another one, so this fits under ``if rank == 0:`` and in code that ranks reach at different times.

    Args:
        function: as for `dist_once`, without arguments. An error that it raises is raised here, and the next process
            that comes runs the function again.
        key: as for `dist_once`.
        directory: as for `dist_once`.
        redo: as for `dist_once`.

    Returns:
        The function's value, from this run or an earlier one.
    """
    with open_single_process_channel() as channel, ExitStack() as stack:
        task = _task(function, key, directory, "process", redo=redo, has_deadline=False)
        return run_once(task, CallContext(channel, Settings.from_environment(), stack))


def _task(
    function: Callable[..., Any],
    key: str,
    directory: str | os.PathLike[str] | None,
    scope: Scope,
    *,
    redo: bool,
    has_deadline: bool,
) -> Task:
    if not isinstance(key, str) or not key:
        raise ArgumentError(f"key={key!r}: expected a name for what the function prepares")
    if scope not in get_args(Scope):
        raise ArgumentError(f"scope={scope!r}: expected one of {', '.join(map(repr, get_args(Scope)))}")
    where: Path = default_directory() if directory is None else expanded(directory).absolute()
    return Task(function, key, where, scope, redo, has_deadline)
