"""The torch.distributed store through which the ranks of one job talk.

rankload opens its own client of a TCPStore: a blocking operation on the process group's client would block every other
user of that client. Only a rank that cannot open one publishes its error through the group's client. Nothing here
depends on an accelerator: a store needs no backend and no device.
"""

from __future__ import annotations

import atexit
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rankload._coordination.polling import silence_limit_seconds
from rankload._platform.daemon_threads import DeadlineThread, Job, park_terminated_threads
from rankload._settings import Settings
from rankload.errors import StoreLostError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

T = TypeVar("T")

#: An expected value that no key ever holds. compare_set() with this value reads a key without blocking or creating it:
#: a missing key returns the expected value (TCPStore.cpp compareSetHandler; same in HashStore, FileStore).
_ABSENT = "\0absent"

#: Time without a connection after which rankload looks for the reason. torch retries silently until its timeout.
_LOOK_AFTER_SECONDS = 1.0

#: How long a request may be pending: torch gives poll(2) a number of milliseconds of 32 bits (24.8 days).
_LONGEST_REQUEST = timedelta(days=20)

#: How long a store operation may take to end after its connection was shut down.
_SEVERED_SECONDS = 2.0

#: Descriptors that are tried where they cannot be listed.
_MAX_DESCRIPTORS = 1 << 16

#: Error numbers in a process, or on a host, that has run out of file descriptors.
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True)
class RankStore:
    """Operations on a torch store. None waits for a key. Every failure is a StoreLostError.

    Attributes:
        store: client of the store; for a TCPStore rankload's own.
        place: name of the store in messages, usually ``host:port``.
        dies_with_rank_0: whether the server runs in rank 0's process (not in torchrun's agent, not in a file).
        patience_seconds: how long the server may take to answer before it counts as lost.
        is_temporary: whether rank 0 hosts the store at the address at which init_process_group will host its own.
    """

    store: Store
    place: str
    dies_with_rank_0: bool
    patience_seconds: float
    is_temporary: bool = False
    _calls: DeadlineThread = field(default_factory=DeadlineThread)

    @property
    def host(self) -> str | None:
        """Host of the store, as this process reaches it; None for a store in a file or in memory."""
        return getattr(_without_prefixes(self.store), "host", None)

    def in_a_hurry(self, patience_seconds: float) -> RankStore:
        """Return the same store with less patience, for a process that is about to exit."""
        return replace(self, patience_seconds=min(patience_seconds, self.patience_seconds))

    def peek(self, key: str) -> str | None:
        """Return a key's value, or None while it does not exist. Only for keys that no rank requests."""
        value = self._call(lambda: self.store.compare_set(key, _ABSENT, _ABSENT)).decode()
        return None if value == _ABSENT else value

    def peek_requested(self, key: str) -> str | None:
        """Return a key's value, or None while it does not exist, with two operations if it exists.

        For a key that others `request`: libuv's server answers pending requests, with an empty value, upon any
        compare_set (TCPStoreLibUvBackend.cpp, compareAndSet).
        """
        return self.peek(key) if self._call(lambda: self.store.check([key])) else None

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        self._call(lambda: self.store.set(key, value))

    def set_first(self, key: str, value: str) -> str:
        """Write a key unless it exists; return the key's value."""
        return self._call(lambda: self.store.compare_set(key, "", value)).decode()

    def settle(self, key: str, value: str) -> str:
        """Like `set_first`, for a key that others `request`."""
        settled = self.set_first(key, value)
        if settled == value:  # a server without libuv (USE_LIBUV=0) answers no pending request upon compare_set
            self.set(key, value)
        return settled

    def add(self, key: str, amount: int = 1) -> int:
        """Add to a counter and return its new value."""
        return self._call(lambda: self.store.add(key, amount))

    def request(self, key: str) -> Job | None:
        """Ask for a key's value. The server answers when the key exists; this client can do nothing else until then.

        Returns:
            The pending call, whose value are bytes; None while an earlier request is pending.
        """
        return self._calls.start(lambda: self.store.get(key)) if self._calls.ends_overdue_call(0) else None

    def _call(self, operation: Callable[[], T]) -> T:
        try:
            return self._calls.call(operation, self.patience_seconds)
        except TimeoutError as error:
            atexit.unregister(self.sever)  # register only once
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
        """End a call that the server has not answered (see `_sever`), at the exit of the process."""
        _sever(getattr(_without_prefixes(self.store), "port", None), self._calls)


def _sever(port: int | None, calls: DeadlineThread) -> None:
    """End a call that a server has not answered, by shutting down this process's connections to the server's port.

    Runs at exit. The server might answer while the interpreter is torn down. Then the thread that waits inside torch
    would need the interpreter's lock, and C++ would end the process by SIGABRT.
    """
    deadline = time.monotonic() + _SEVERED_SECONDS
    while not calls.ends_overdue_call(0) and time.monotonic() < deadline:  # torch connects again, for a while
        for descriptor in _open_descriptors():
            _shut_down(descriptor, port)
        calls.ends_overdue_call(_SEVERED_SECONDS / 20)
    if not calls.ends_overdue_call(0):  # such as a client that nobody answers, and that tries again until its timeout
        park_terminated_threads()


def _open_descriptors() -> Sequence[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 - numbers, not paths
    except OSError:  # no /proc, or no descriptor left to list it with
        return range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MAX_DESCRIPTORS))


def _shut_down(descriptor: int, port: int | None) -> None:
    """Shut down a descriptor that is a connection to a port; leave all others alone."""
    with suppress(OSError):
        connection = socket.socket(fileno=descriptor)  # not a duplicate: there may be no descriptor left
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()


def store_of_group(group: ProcessGroup, settings: Settings) -> RankStore:
    """Open rankload's own client to the store of a process group, with the group's key prefixes.

    The prefixes separate worlds that share a server. torch's `Store.clone` keeps them, but is newer than torch 2.6.

    Raises:
        StoreLostError: the server is gone, or does not answer within the liveness limit.
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
    """Open a client to a TCPStore that is known to listen.

    Args:
        host: host of the store.
        port: port of the store.
        settings: deadlines.
        dies_with_rank_0: whether the server runs in rank 0's process (see `RankStore`).
        limit_seconds: how long the server may take to answer.
        make_client: makes the client; default: torch's constructor.

    Raises:
        StoreLostError: nothing listens there any more, or the listener does not answer like a store.
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
            pause_seconds *= 2  # each look costs the server a connection, and perhaps a name lookup
            look_at = time.monotonic() + pause_seconds

    try:
        store = calls.call(make_client or connect_as_usual, limit_seconds, look)
    except (RuntimeError, OSError, UnicodeError) as error:  # ConnectionError and TimeoutError are OSErrors
        if not calls.ends_overdue_call(0):
            atexit.register(_sever, port, calls)
        whose = f"rank 0 on {host}" if dies_with_rank_0 else "the launcher"
        raise StoreLostError(
            f"cannot reach the store of {whose} at {place}: {error}. Its process has ended or is frozen, or something "
            "else listens at that port, or name lookups are slow (RANKLOAD_CONNECT_SECONDS; see docs/faults.md)",
            place=place,
        ) from error
    return RankStore(store, place, dies_with_rank_0, silence_limit_seconds(settings), _calls=calls)


def client_for_requests(store: RankStore, settings: Settings) -> RankStore | None:
    """Open another client of a store, for `RankStore.request`; return None if the store is no TCPStore.

    Raises:
        StoreLostError: as `connect`.
    """
    from torch._C._distributed_c10d import TCPStore

    base: Any = _without_prefixes(store.store)
    if not isinstance(base, TCPStore):
        return None
    client = connect(
        base.host,
        base.port,
        settings,
        dies_with_rank_0=store.dies_with_rank_0,
        limit_seconds=store.patience_seconds,
        make_client=getattr(store.store, "clone", None),
    )
    client.store.set_timeout(_LONGEST_REQUEST)
    return client


def _check_listener(host: str, port: int) -> None:
    """Try a plain connection; raise its error if nothing listens there, or if file descriptors have run out.

    torch's client retries in both cases until its timeout. A slow connection is no error: the name server may be slow.
    """
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except ConnectionRefusedError:
        raise
    except OSError as error:
        if error.errno in _OUT_OF_DESCRIPTORS:
            raise


def is_agent_endpoint(host: str, port: int, environ: Mapping[str, str]) -> bool:
    """Return whether torchrun's agent hosts the store at an address."""
    return uses_agent_store(environ) and endpoint_of(environ) == (host, port)


def endpoint_of(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return MASTER_ADDR and MASTER_PORT; None if they are not set."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    return (host, int(port)) if host and port.isdecimal() else None


def uses_agent_store(environ: Mapping[str, str]) -> bool:
    """Return whether torchrun's agent hosts the store."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
