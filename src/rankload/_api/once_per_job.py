"""Run a function once for all processes of a job that share a directory. Not collective: no rank waits for another one.

The first process that comes runs the function under a lease. The others, whenever they come, get its value or its
error. The n-th calls of all processes with one key belong together (`Turn`): a second call runs the function again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankload._coordination.call_context import CallContext
from rankload._coordination.job import next_turn
from rankload._coordination.membership import open_single_process_channel, own_identity
from rankload._coordination.verdict import as_shared_error
from rankload._fetch.run_once import Task, run_once
from rankload._settings import Settings
from rankload.errors import ArgumentError, CacheError, RankloadError, from_wire, to_wire

#: Age after which another process's failure counts no longer: the origin may serve the file by now.
_MAX_FAILURE_AGE_SECONDS = 120.0


@dataclass(frozen=True)
class ErrorCodec:
    """How errors reach the other processes.

    Attributes:
        encode: returns JSON for an error; None for an error that cannot be rebuilt.
        decode: rebuilds the error.
        max_age_seconds: age after which an error counts no longer, and the function is tried again.
    """

    encode: Callable[[Exception], dict[str, Any] | None]
    decode: Callable[[dict[str, Any]], Exception]
    max_age_seconds: float = _MAX_FAILURE_AGE_SECONDS


def _encoded(error: Exception) -> dict[str, Any] | None:
    return to_wire(as_shared_error(error, own_identity())) if isinstance(error, RankloadError) else None


def _decoded(wire: dict[str, Any]) -> Exception:
    error = from_wire(wire)
    error.is_from_another_rank = True
    return error


RANKLOAD_ERRORS = ErrorCodec(_encoded, _decoded)


def once_per_job(
    function: Callable[[], Any],
    *,
    key: str,
    directory: Path,
    is_usable: Callable[[Any], bool] = lambda value: True,
    errors: ErrorCodec = RANKLOAD_ERRORS,
    has_lease: bool = True,
) -> Any:
    """Return the function's value, of this process or another one of its job.

    Where no stamp can be kept, every process runs the function.

    Args:
        function: returns what JSON can hold. May run in several processes at once if no lease can be had.
        key: all that the function depends on. The same on all ranks.
        directory: keeps the stamp. Processes that share it share a run.
        is_usable: whether another process's value can be used here; else this process runs the function.
        errors: codec for the errors of the function. After an error that it cannot encode, each process runs the
            function itself.
        has_lease: whether a process without a job takes the lease, too. Then processes that wait for it share its run.

    Raises:
        Exception: any error of the function, here or in another process of the job.
    """
    turn = next_turn(f"{directory}\0{key}")
    if turn is None and not has_lease:
        return function()
    outcome: dict[str, Any] = {}
    failure: Exception | None = None

    def attempt() -> dict[str, Any]:
        nonlocal outcome, failure
        try:
            outcome = {"value": function()}
        except Exception as error:
            if turn is None:  # no other process needs to know
                raise
            failure, outcome = error, {"error": errors.encode(error), "failed_at": time.time()}
        return outcome

    try:
        with open_single_process_channel() as channel, ExitStack() as stack:
            call = CallContext(channel, Settings.from_environment(), stack)
            shared = run_once(Task(attempt, key, directory, "process", turn or True, has_deadline=False), call)
    except (CacheError, ArgumentError):  # the stamp cannot be kept, or cannot hold the value
        if turn is None:
            raise
        shared = outcome or attempt()
    if failure is not None:
        raise failure
    if "value" in shared:
        return shared["value"] if outcome or is_usable(shared["value"]) else function()
    if shared["error"] is None or time.time() - shared["failed_at"] > errors.max_age_seconds:
        return function()
    raise errors.decode(shared["error"])
