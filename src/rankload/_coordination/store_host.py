"""Host a store in rank 0's process."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rankload._coordination.polling import silence_limit_seconds
from rankload._coordination.store import RankStore, connect
from rankload._platform.daemon_threads import DeadlineThread
from rankload._settings import PORTS_VARIABLE, Settings, ports_to_try
from rankload.errors import CoordinationError

#: Descriptors and ports of listening sockets: a forked child must not keep a port busy that its parent has left.
_listeners: list[tuple[int, int]] = []

#: State of a listening socket in /proc/net/tcp (include/net/tcp_states.h).
_TCP_LISTEN = "0A"


def host_store(host: str, port: int, settings: Settings) -> RankStore:
    """Host a TCPStore in this process, at all addresses of this host, and open a client to it.

    Other code in this process that hosts at the same port (init_process_group) shares the server, unless ``port`` is 0.

    Args:
        host: name or address by which the client reaches this host.
        port: port to listen at; 0 for any free port.
        settings: deadlines.

    Raises:
        CoordinationError: ``host`` cannot be resolved, or the port is taken.
    """
    from torch._C._distributed_c10d import TCPStore

    calls, timeout = DeadlineThread(), timedelta(seconds=settings.connect_seconds)
    is_taken = False

    def make_store() -> TCPStore:
        nonlocal is_taken
        socket.getaddrinfo(host, port)  # fail early: torch would retry for a minute and a half
        listener = _listen_at_any(ports_to_try() if port == 0 else [port])
        if listener is None and port == 0:
            raise OSError(errno.EADDRINUSE, f"all ports of {PORTS_VARIABLE} are taken")
        if listener is None:
            is_taken = True  # perhaps by this process: then torch shares the server
            return TCPStore(host, port, is_master=True, multi_tenant=True, wait_for_workers=False, timeout=timeout)
        bound_port = listener.getsockname()[1]
        _listeners.append((listener.fileno(), bound_port))
        return TCPStore(
            host,
            bound_port,
            is_master=True,
            multi_tenant=port != 0,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )

    try:
        store = calls.call(make_store, settings.connect_seconds)
    except (RuntimeError, OSError, UnicodeError) as error:  # UnicodeError: no name in DNS
        problem = f"the port is taken, probably by {_who_holds(port)}" if is_taken else str(error)
        raise CoordinationError(
            f"rank 0 cannot open a store at {host}:{port}: {problem}. Set MASTER_ADDR to rank 0's host and "
            "MASTER_PORT to a free port, the same on all ranks",
            place=f"{host}:{port}",
        ) from error
    return RankStore(store, f"{host}:{store.port}", True, silence_limit_seconds(settings), _calls=calls)


def host_neighbour(rendezvous: RankStore, settings: Settings) -> tuple[RankStore, int]:
    """Host another store on this host, at a free port; return the store and that port."""
    place: Any = rendezvous.store
    store = host_store(place.host, 0, settings)
    hosted: Any = store.store
    return store, hosted.port


def neighbour(rendezvous: RankStore, port: int, settings: Settings) -> RankStore:
    """Open a client to the store that `host_neighbour` hosts on rank 0."""
    place: Any = rendezvous.store
    limit_seconds = silence_limit_seconds(settings)
    return connect(place.host, port, settings, dies_with_rank_0=True, limit_seconds=limit_seconds)


def _who_holds(port: int) -> str:
    """Return, for a message, which process listens at a port of this host, as far as this user may know."""
    sockets = _listening_sockets(port)
    with suppress(OSError):
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # another user's process, or one that has ended
                if any(str(link.readlink()) in sockets for link in (process / "fd").iterdir()):
                    # the command line could contain a token
                    return f"process {process.name} ({(process / 'comm').read_text().strip()!r})"
    return "another job on this host, or an earlier one that has not ended"


def _listening_sockets(port: int) -> set[str]:
    """Return the sockets that listen at a port, named as in the links of /proc/<pid>/fd.

    See proc_pid_net(5) and proc_pid_fd(5).
    """
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if int(columns[1].rpartition(":")[2], 16) == port and columns[3] == _TCP_LISTEN:
                    sockets.add(f"socket:[{columns[9]}]")
    return sockets


def _listen_at_any(ports: list[int]) -> socket.socket | None:
    return next((listener for port in ports if (listener := _listen(port)) is not None), None)


def _listen(port: int) -> socket.socket | None:
    """Listen at all addresses of this host, IPv6 and IPv4, as torch does; return None if the port is taken."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise


def _let_go_of_listeners() -> None:
    """Close inherited listening sockets in a forked child. A descriptor may belong to another file by now."""
    for descriptor, port in _listeners:
        with suppress(OSError):
            with socket.socket(fileno=os.dup(descriptor)) as inherited:
                is_listening = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if not is_listening or inherited.getsockname()[1] != port:
                    continue
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, descriptor, inheritable=False)  # keep the number in use: torch may close it later
            os.close(null)
    _listeners.clear()


os.register_at_fork(after_in_child=_let_go_of_listeners)
