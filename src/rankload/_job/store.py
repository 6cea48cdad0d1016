"""The torch.distributed store through which the ranks of one job talk.

Never the process group's own client: a blocking operation on it would block everybody else who uses it. Never
anything accelerator-bound either: a store needs neither a backend nor a device.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rankload._errors import ArrivalTimeoutError, CoordinationError, StoreLostError
from rankload._job.environment import slurm_step_endpoint
from rankload._settings import Settings
from rankload._types import Identity

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

T = TypeVar("T")

#: compare_set() with an expected value that no key ever holds reads a key without blocking and without creating it:
#: it returns the expected value when the key is missing (TCPStore.cpp compareSetHandler; same in HashStore, FileStore).
_ABSENT = "\0absent"

#: How long one store operation may take before the store counts as lost. Only non-blocking operations are made.
_OPERATION_SECONDS = 60.0


@dataclass(frozen=True)
class RankStore:
    """Non-blocking operations on a torch store. Every failure is a StoreLostError.

    Attributes:
        store: a client of our own.
        place: how to name the store in messages.
        dies_with_rank_0: the server runs in rank 0's process (not in torchrun's agent, not in a file).
    """

    store: Store
    place: str
    dies_with_rank_0: bool

    def peek(self, key: str) -> str | None:
        """Return a key's value, or None while it does not exist."""
        value = self._call(lambda: self.store.compare_set(key, _ABSENT, _ABSENT)).decode()
        return None if value == _ABSENT else value

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        self._call(lambda: self.store.set(key, value))

    def set_first(self, key: str, value: str) -> str:
        """Write a key unless somebody has; return the value that it holds now."""
        return self._call(lambda: self.store.compare_set(key, "", value)).decode()

    def add(self, key: str, amount: int = 1) -> int:
        """Add to a counter and return its new value."""
        return self._call(lambda: self.store.add(key, amount))

    def _call(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except (RuntimeError, ConnectionError) as error:  # torch's DistError is a RuntimeError
            owner = "rank 0's process" if self.dies_with_rank_0 else "its server"
            raise StoreLostError(
                f"lost the store at {self.place}: {owner} has ended or cannot be reached; see that process's output",
                place=self.place,
                cause=str(error),
            ) from error


def store_of_group(group: ProcessGroup) -> RankStore:
    """Open our own client to the store behind a process group."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed re-exports them untyped
    from torch.distributed import distributed_c10d

    base: Any = distributed_c10d._world.pg_map[group][1]
    while isinstance(base, PrefixStore):
        base = base.underlying_store
    if isinstance(base, TCPStore):
        return connect(base.host, base.port, dies_with_rank_0=not _is_agent_endpoint(base.host, base.port, os.environ))
    return RankStore(base, type(base).__name__, dies_with_rank_0=False)


def store_from_environment(identity: Identity, settings: Settings) -> RankStore | None:
    """Open the job's store without a process group, hosting it in rank 0 where nobody else does.

    Returns None when the environment names no meeting point: then ranks meet through the lease only.

    Raises:
        ArrivalTimeoutError: rank 0 did not open the store in time.
        CoordinationError: rank 0 cannot listen at the address that the environment gives.
    """
    environ = os.environ
    if endpoint := _endpoint(environ):
        if _uses_agent_store(environ):
            return connect(*endpoint, dies_with_rank_0=False)
    elif identity.launcher == "slurm":
        endpoint = slurm_step_endpoint(environ)
    if endpoint is None:
        return None
    if identity.rank == 0:
        return _host(*endpoint)
    _await_listener(*endpoint, settings.arrival_seconds)
    return connect(*endpoint, dies_with_rank_0=True)


def connect(host: str, port: int, *, dies_with_rank_0: bool) -> RankStore:
    """Open a client to a TCPStore that is known to listen."""
    from torch._C._distributed_c10d import TCPStore

    place = f"{host}:{port}"
    try:
        store = TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_OPERATION_SECONDS)
        )
    except RuntimeError as error:
        raise StoreLostError(f"cannot reach the store at {place}: {error}", place=place) from error
    return RankStore(store, place, dies_with_rank_0)


def _host(host: str, port: int) -> RankStore:
    from torch._C._distributed_c10d import TCPStore

    try:
        # multi_tenant: a later env:// init_process_group hosts at the same port, and must find it shareable
        store = TCPStore(
            host,
            port,
            is_master=True,
            multi_tenant=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_OPERATION_SECONDS),
        )
    except RuntimeError as error:
        raise CoordinationError(
            f"rank 0 cannot open a store at {host}:{port}: {error}. Set MASTER_ADDR to rank 0's host and "
            "MASTER_PORT to a free port, alike on all ranks",
            place=f"{host}:{port}",
        ) from error
    return RankStore(store, f"{host}:{port}", dies_with_rank_0=True)


def _await_listener(host: str, port: int, arrival_seconds: float) -> None:
    """Wait until rank 0 listens. TCPStore's own wait sits in C++, where no Python signal handler runs."""
    deadline = time.monotonic() + arrival_seconds
    delay = 0.01
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ArrivalTimeoutError(
                    f"rank 0 did not open the store at {host}:{port} within {arrival_seconds:g} s ({error}): "
                    "it never made this call, or MASTER_ADDR and MASTER_PORT differ between ranks",
                    place=f"{host}:{port}",
                ) from error
        time.sleep(delay)
        delay = min(delay * 1.5, 0.25)


def _endpoint(environ: Mapping[str, str]) -> tuple[str, int] | None:
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    return (host, int(port)) if host and port.isdigit() else None


def _uses_agent_store(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_agent_endpoint(host: str, port: int, environ: Mapping[str, str]) -> bool:
    return _uses_agent_store(environ) and _endpoint(environ) == (host, port)
