"""The torch.distributed store through which the ranks of one job talk.

Never the process group's own client: a blocking operation on it would block everybody else who uses it. Never
anything accelerator-bound either: a store needs neither a backend nor a device.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rankload._errors import ArrivalTimeoutError, CoordinationError, StoreLostError
from rankload._job.bounded import BoundedCalls
from rankload._job.environment import slurm_step_endpoint
from rankload._job.polling import silence_limit_seconds, until_rank_0_comes
from rankload._settings import Settings
from rankload._types import Identity

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

T = TypeVar("T")

#: compare_set() with an expected value that no key ever holds reads a key without blocking and without creating it:
#: it returns the expected value when the key is missing (TCPStore.cpp compareSetHandler; same in HashStore, FileStore).
_ABSENT = "\0absent"

#: How long torch may take to connect to a server that is known to listen.
_CONNECT_SECONDS = 60.0


@dataclass(frozen=True)
class RankStore:
    """Operations on a torch store that wait for no key. Every failure is a StoreLostError.

    Attributes:
        store: a client of our own.
        place: how to name the store in messages.
        dies_with_rank_0: the server runs in rank 0's process (not in torchrun's agent, not in a file).
        patience_seconds: how long the server may take to answer before it counts as lost.
        is_temporary: hosted where init_process_group is going to host its own.
    """

    store: Store
    place: str
    dies_with_rank_0: bool
    patience_seconds: float
    is_temporary: bool = False
    _calls: BoundedCalls = field(default_factory=BoundedCalls)

    @property
    def host(self) -> str | None:
        """Return the host that the store is on, as this process reaches it; None for one in a file or in memory."""
        return getattr(_without_prefixes(self.store), "host", None)

    def in_a_hurry(self, patience_seconds: float) -> RankStore:
        """Return the same store for a process that is about to end."""
        return replace(self, patience_seconds=min(patience_seconds, self.patience_seconds))

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
            return self._calls.call(operation, self.patience_seconds)
        except (RuntimeError, ConnectionError, TimeoutError) as error:  # torch's DistError is a RuntimeError
            owner = "rank 0's process" if self.dies_with_rank_0 else "its server"
            raise StoreLostError(
                f"lost the store at {self.place}: {owner} has ended, is frozen or cannot be reached; see its output",
                place=self.place,
                cause=str(error),
            ) from error


def store_of_group(group: ProcessGroup, settings: Settings) -> RankStore:
    """Open our own client to the store behind a process group, with the group's prefixes.

    They tell worlds apart that share a server; torch's `Store.clone`, which keeps them, is younger than torch 2.6.
    """
    from torch._C._distributed_c10d import TCPStore  # torch.distributed re-exports it untyped
    from torch.distributed import distributed_c10d

    prefixed: Any = distributed_c10d._world.pg_map[group][1]
    base: Any = _without_prefixes(prefixed)
    if isinstance(base, TCPStore):
        is_agents = _is_agent_endpoint(base.host, base.port, os.environ)
        clone = getattr(prefixed, "clone", None)
        return _connect(base.host, base.port, settings, dies_with_rank_0=not is_agents, connect=clone)
    return RankStore(prefixed, type(base).__name__, False, silence_limit_seconds(settings))


def _without_prefixes(store: Store) -> Store:
    from torch._C._distributed_c10d import PrefixStore

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


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
            return _connect(*endpoint, settings, dies_with_rank_0=False)
    elif identity.launcher == "slurm":
        endpoint = slurm_step_endpoint(environ)
    if endpoint is None:
        return None
    if identity.rank == 0:
        return replace(_host(*endpoint, settings), is_temporary=True)
    _await_listener(*endpoint, identity, settings)
    return replace(_connect(*endpoint, settings, dies_with_rank_0=True), is_temporary=True)


def host_neighbour(meeting_point: RankStore, settings: Settings) -> tuple[RankStore, int]:
    """Host another store on this host; return it and its port."""
    place: Any = meeting_point.store
    store = _host(place.host, 0, settings)
    hosted: Any = store.store
    return store, hosted.port


def neighbour(meeting_point: RankStore, port: int, settings: Settings) -> RankStore:
    """Open a client to what `host_neighbour` hosts on rank 0."""
    place: Any = meeting_point.store
    return _connect(place.host, port, settings, dies_with_rank_0=True)


def _connect(
    host: str,
    port: int,
    settings: Settings,
    *,
    dies_with_rank_0: bool,
    connect: Callable[[], Store] | None = None,
) -> RankStore:
    """Open a client to a TCPStore that is known to listen; ``connect`` makes one in another way."""
    from torch._C._distributed_c10d import TCPStore

    place, calls = f"{host}:{port}", BoundedCalls()
    timeout = timedelta(seconds=_CONNECT_SECONDS)

    def connect_as_usual() -> Store:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    try:
        store = calls.call(connect or connect_as_usual, _CONNECT_SECONDS)
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        raise StoreLostError(f"cannot reach the store at {place}: {error}", place=place) from error
    return RankStore(store, place, dies_with_rank_0, silence_limit_seconds(settings), _calls=calls)


def _host(host: str, port: int, settings: Settings) -> RankStore:
    from torch._C._distributed_c10d import TCPStore

    calls, timeout = BoundedCalls(), timedelta(seconds=_CONNECT_SECONDS)

    def host_store() -> TCPStore:
        socket.getaddrinfo(host, port)  # torch would try for a minute and a half
        # multi_tenant: whoever hosts at the same address in this process (init_process_group) shares the server
        return TCPStore(host, port, is_master=True, multi_tenant=port != 0, wait_for_workers=False, timeout=timeout)

    try:
        store = calls.call(host_store, _CONNECT_SECONDS)
    except (RuntimeError, OSError) as error:
        raise CoordinationError(
            f"rank 0 cannot open a store at {host}:{port}: {error}. Set MASTER_ADDR to rank 0's host and "
            "MASTER_PORT to a free port, alike on all ranks",
            place=f"{host}:{port}",
        ) from error
    return RankStore(store, f"{host}:{store.port}", True, silence_limit_seconds(settings), _calls=calls)


def _await_listener(host: str, port: int, identity: Identity, settings: Settings) -> None:
    """Wait until rank 0 listens. TCPStore's own wait sits in C++, where no Python signal handler runs."""
    refused: OSError | None = None
    try:
        for _ in until_rank_0_comes(identity, settings):
            try:
                socket.create_connection((host, port), timeout=5).close()
                return
            except OSError as error:
                refused = error
    except ArrivalTimeoutError as error:
        raise ArrivalTimeoutError(
            f"{error.message} [no store at {host}:{port}: {refused}]", **error.fields, place=f"{host}:{port}"
        ) from refused


def _endpoint(environ: Mapping[str, str]) -> tuple[str, int] | None:
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    return (host, int(port)) if host and port.isdigit() else None


def _uses_agent_store(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_agent_endpoint(host: str, port: int, environ: Mapping[str, str]) -> bool:
    return _uses_agent_store(environ) and _endpoint(environ) == (host, port)
