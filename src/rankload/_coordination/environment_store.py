"""The store of a job without a process group: rank 0 hosts it at the address from the environment.

A listener at that address is no proof: MASTER_PORT may belong to another job. So rank 0 writes a key that proves whose
store it is.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from typing import Any

from rankload._coordination.polling import backoff, until_rank_0_comes
from rankload._coordination.slurm import slurm_step_endpoint
from rankload._coordination.store import RankStore, connect, endpoint_of, uses_agent_store
from rankload._coordination.store_host import host_store
from rankload._platform.clock import SuspendAwareTimer
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ArgumentError, ArrivalTimeoutError, CoordinationError

_PROOF_KEY = "rankload/host"

#: Longest time that one round of waiting may count. A longer round means that this process was stopped.
_MAX_ROUND_SECONDS = 2.0


def store_from_environment(identity: Identity, settings: Settings) -> RankStore | None:
    """Open the job's store without a process group. Rank 0 hosts the store unless torchrun's agent does.

    Returns:
        The store; None if the environment gives no address. Then only the lease prevents a second download.

    Raises:
        ArgumentError: the environment's port is none.
        ArrivalTimeoutError: rank 0 did not open the store in time.
        CoordinationError: rank 0 cannot listen at the environment's address. On the other ranks: that address cannot be
            resolved, or something else listens there.
    """
    endpoint = endpoint_of(os.environ)
    if endpoint is not None and uses_agent_store(os.environ):
        return connect(*endpoint, settings, dies_with_rank_0=False, limit_seconds=settings.connect_seconds)
    endpoint = environment_endpoint(identity)
    if endpoint is None:
        return None
    if identity.rank == 0:
        store = host_store(*endpoint, settings)
        prove(store, identity)
    else:
        _await_listener(*endpoint, identity, settings)
        limit_seconds = settings.connect_seconds
        store = connect(*endpoint, settings, dies_with_rank_0=True, limit_seconds=limit_seconds)
        _await_proof(store, identity, settings)
    return replace(store, is_temporary=True)


def environment_endpoint(identity: Identity) -> tuple[str, int] | None:
    """Return host and port of rank 0's store: MASTER_ADDR and MASTER_PORT, else derived from the SLURM step's id.

    Raises:
        ArgumentError: MASTER_PORT is too large, as one that is computed from a job's id may be, or 0.
    """
    endpoint = endpoint_of(os.environ)
    if endpoint is not None and not 0 < endpoint[1] < 1 << 16:
        value = os.environ["MASTER_PORT"]
        raise ArgumentError(
            f"MASTER_PORT={value[:80]!r}: expected a port from 1 to 65535, the same on all ranks",
            variable="MASTER_PORT",
            value=value,
        )
    return slurm_step_endpoint(os.environ) if endpoint is None and identity.launcher == "slurm" else endpoint


def prove(store: RankStore, identity: Identity) -> None:
    """Write the proof key: rank 0 of a job of this size hosts this store."""
    store.set(_PROOF_KEY, json.dumps({"world_size": identity.world_size, "host": identity.host, "pid": os.getpid()}))


def _await_listener(host: str, port: int, identity: Identity, settings: Settings) -> None:
    """Wait until rank 0 listens. TCPStore's own wait runs in C++, where no Python signal handler can run.

    A name that cannot be resolved is tried again for as long as a connection attempt may take.
    """
    problem: OSError | UnicodeError | None = None
    unresolved = SuspendAwareTimer(2 * _MAX_ROUND_SECONDS)
    try:
        for _ in until_rank_0_comes(identity, settings):
            try:
                socket.create_connection((host, port), timeout=5).close()
                return
            except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name in DNS
                unresolved.count()
                if unresolved.seconds >= settings.connect_seconds:
                    raise CoordinationError(
                        f"cannot resolve {host}, the host of rank 0's store: {error}. Set MASTER_ADDR to a name or an "
                        "address of rank 0's host that every node can resolve",
                        place=f"{host}:{port}",
                    ) from error
                problem = error
            except OSError as error:
                unresolved.restart()
                problem = error
    except ArrivalTimeoutError as error:
        raise ArrivalTimeoutError(
            f"{error.message} [no store at {host}:{port}: {problem}]", **error.fields, place=f"{host}:{port}"
        ) from problem


def _await_proof(store: RankStore, identity: Identity, settings: Settings) -> None:
    """Wait for rank 0's proof key, which rank 0 writes as soon as it hosts the store.

    Raises:
        CoordinationError: another job, or something else, hosts the store.
        StoreLostError: the store does not answer.
    """
    waited = SuspendAwareTimer(_MAX_ROUND_SECONDS)
    for _ in backoff(identity.world_size):
        if text := store.peek(_PROOF_KEY):
            _check_proof(json.loads(text), store, identity)
            return
        waited.count()
        if waited.seconds >= settings.connect_seconds:
            raise CoordinationError(
                f"the store at {store.place} is not one that rank 0 of this job hosts for rankload: another job, an "
                "earlier one that has not ended, or rank 0's process group holds the port. Set MASTER_PORT to a free "
                "port, the same on all ranks, and call init_process_group on all of them or on none",
                place=store.place,
            )


def _check_proof(proof: dict[str, Any], store: RankStore, identity: Identity) -> None:
    if proof["world_size"] != identity.world_size:
        raise CoordinationError(
            f"the store at {store.place} belongs to another job with {proof['world_size']} ranks, whose rank 0 is "
            f"process {proof['pid']} on {proof['host']}; this job has {identity.world_size}. Set MASTER_PORT to a "
            "free port, the same on all ranks",
            place=store.place,
        )
