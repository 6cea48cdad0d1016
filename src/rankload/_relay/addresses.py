"""Find the addresses at which other ranks may reach this one."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress

#: Variables of gloo and NCCL in which users name the network interface between nodes.
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

#: ioctl(2) that returns an interface's IPv4 address (linux/sockios.h). struct ifreq holds the name in 16 bytes, then
#: family, port and address.
_SIOCGIFADDR = 0x8915
_IFREQ_BYTES = 40
_ADDRESS_IN_IFREQ = slice(20, 24)


def own_addresses(store_host: str | None) -> list[str]:
    """Return this host's addresses, the likeliest first.

    The order: the interfaces that the user named, the source address of the route to the store, the addresses of the
    host name, the addresses of all interfaces, and loopback. Loopback comes last because a host name may resolve to
    loopback on its own host. The address of a bridge may belong to another host elsewhere. The handshake tells the
    upstream rank whether it has reached the right process.

    Args:
        store_host: host of the job's store, which every rank can reach; None if unknown.
    """
    found = [*_named_by_user(), *_towards(store_host), *_of_host_name(), *_of_interfaces()]
    return [*dict.fromkeys(address for address in found if not _is_loopback(address)), "127.0.0.1"]


def _named_by_user() -> Iterator[str]:
    for variable in _INTERFACE_VARIABLES:
        for name in os.environ.get(variable, "").lstrip("=^").split(","):
            if name and not os.environ[variable].startswith("^"):  # NCCL excludes interfaces by a leading ^
                yield from _of_interface(name.partition(":")[0])


def _towards(host: str | None) -> Iterator[str]:
    if host is None:
        return
    with suppress(OSError):
        for family, kind, *_, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # connect() of a datagram socket sends nothing; it only looks up the route
                yield probe.getsockname()[0]


def _of_host_name() -> Iterator[str]:
    with suppress(OSError):
        for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            yield str(address[0])


def _of_interfaces() -> Iterator[str]:
    with suppress(OSError):
        for _, name in socket.if_nameindex():
            yield from _of_interface(name)


def _of_interface(name: str) -> Iterable[str]:
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[:15])
            return [socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[_ADDRESS_IN_IFREQ])]
    except (ImportError, OSError):  # no such interface, or no IPv4 address
        return []


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
