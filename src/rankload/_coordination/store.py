"""The torch.distributed store through which the ranks of one job talk.

Never the process group's own client: a blocking operation on it would block everybody else who uses it. Never
anything accelerator-bound either: a store needs neither a backend nor a device.
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rankload._coordination.polling import silence_limit_seconds
from rankload._platform.daemon_threads import DeadlineThread
from rankload._settings import Settings
from rankload.errors import StoreLostError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

T = TypeVar("T")

#: compare_set() with an expected value that no key ever holds reads a key without blocking and without creating it:
#: it returns the expected value when the key is missing (TCPStore.cpp compareSetHandler; same in HashStore, FileStore).
_ABSENT = "\0absent"

#: After this long without a connection, look why. torch itself retries silently until its timeout.
_LOOK_AFTER_SECONDS = 1.0

#: How long a severed call may take to end.
_SEVERED_SECONDS = 2.0

#: What a process that has run out of descriptors gets.
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


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
    _calls: DeadlineThread = field(default_factory=DeadlineThread)

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
        except TimeoutError as error:
            atexit.unregister(self.sever)  # once is enough
            atexit.register(self.sever)
            raise self._lost(error) from error
        except (RuntimeError, ConnectionError) as error:  # torch's DistError is a RuntimeError
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> StoreLostError:
        owner = "rank 0's process" if self.dies_with_rank_0 else "its server"
        return StoreLostError(
            f"lost the store at {self.place}: {owner} has ended, is frozen or cannot be reached; see its output",
            place=self.place,
            cause=str(error),
        )

    def sever(self) -> None:
        """See `_sever`."""
        _sever(getattr(_without_prefixes(self.store), "port", None), self._calls)


def _sever(port: int | None, calls: DeadlineThread) -> None:
    """End a call that a server has not answered, by shutting down this process's connections to its port.

    For the end of the process: should the server answer while the interpreter is torn down, the thread that waits
    inside torch would need the interpreter's lock, and C++ ends the process by SIGABRT.
    """
    deadline = time.monotonic() + _SEVERED_SECONDS
    while not calls.ends_overdue_call(0) and time.monotonic() < deadline:  # torch connects again, for a while
        with suppress(OSError):  # no /proc
            for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers, not paths
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[1] == port:
                        connection.shutdown(socket.SHUT_RDWR)
        calls.ends_overdue_call(_SEVERED_SECONDS / 20)


def store_of_group(group: ProcessGroup, settings: Settings) -> RankStore:
    """Open our own client to the store behind a process group, with the group's prefixes.

    They tell worlds apart that share a server; torch's `Store.clone`, which keeps them, is younger than torch 2.6.

    Raises:
        StoreLostError: the server has gone, or does not answer within the liveness limit.
    """
    from torch._C._distributed_c10d import TCPStore  # torch.distributed re-exports it untyped

    prefixed = client_of_group(group)
    base: Any = _without_prefixes(prefixed)
    if isinstance(base, TCPStore):
        is_agents = is_agent_endpoint(base.host, base.port, os.environ)
        return connect(
            base.host,
            base.port,
            settings,
            dies_with_rank_0=not is_agents,
            limit_seconds=silence_limit_seconds(settings),
            make_client=getattr(prefixed, "clone", None),
        )
    return RankStore(prefixed, type(base).__name__, False, silence_limit_seconds(settings))


def client_of_group(group: ProcessGroup) -> Store:
    """Return the process group's own client."""
    from torch.distributed import distributed_c10d

    client: Store = distributed_c10d._world.pg_map[group][1]
    return client


def _without_prefixes(store: Store) -> Store:
    from torch._C._distributed_c10d import PrefixStore

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def connect(
    host: str,
    port: int,
    settings: Settings,
    *,
    dies_with_rank_0: bool,
    limit_seconds: float,
    make_client: Callable[[], Store] | None = None,
) -> RankStore:
    """Open a client to a TCPStore that has been seen to listen.

    Args:
        host: its host.
        port: its port.
        settings: deadlines.
        dies_with_rank_0: see `RankStore`.
        limit_seconds: how long it may take to answer.
        make_client: makes the client in another way than torch's constructor.

    Raises:
        StoreLostError: nobody listens there any more, or who listens does not answer as a store does.
    """
    from torch._C._distributed_c10d import TCPStore

    place, calls = f"{host}:{port}", DeadlineThread()
    look_at, pause_seconds = time.monotonic() + _LOOK_AFTER_SECONDS, _LOOK_AFTER_SECONDS

    def connect_as_usual() -> Store:
        timeout = timedelta(seconds=limit_seconds)
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def look() -> None:
        nonlocal look_at, pause_seconds
        if time.monotonic() >= look_at:
            _check_listener(host, port)
            pause_seconds *= 2  # each look is a connection more, whose name the server may have to look up
            look_at = time.monotonic() + pause_seconds

    try:
        store = calls.call(make_client or connect_as_usual, limit_seconds, look)
    except (RuntimeError, OSError) as error:  # ConnectionError and TimeoutError are OSErrors
        if not calls.ends_overdue_call(0):
            atexit.register(_sever, port, calls)
        whose = f"rank 0 on {host}" if dies_with_rank_0 else "the launcher"
        raise StoreLostError(
            f"cannot reach the store of {whose} at {place}: {error}. Its process has ended or is frozen, or something "
            "else listens at that port, or name lookups hold it up (RANKLOAD_CONNECT_SECONDS; see docs/faults.md)",
            place=place,
        ) from error
    return RankStore(store, place, dies_with_rank_0, silence_limit_seconds(settings), _calls=calls)


def _check_listener(host: str, port: int) -> None:
    """Raise what a plain connection says of a place where nobody listens, or of a process out of descriptors.

    torch's client retries both until its timeout. A slow connection is not judged: the name server may be slow.
    """
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except ConnectionRefusedError:
        raise
    except OSError as error:
        if error.errno in _OUT_OF_DESCRIPTORS:
            raise


def is_agent_endpoint(host: str, port: int, environ: Mapping[str, str]) -> bool:
    """Return whether torchrun's agent hosts the store there."""
    return uses_agent_store(environ) and endpoint_of(environ) == (host, port)


def endpoint_of(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return MASTER_ADDR and MASTER_PORT."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    return (host, int(port)) if host and port.isdigit() else None


def uses_agent_store(environ: Mapping[str, str]) -> bool:
    """Return whether torchrun's agent hosts the store."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
