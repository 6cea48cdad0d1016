"""Find the addresses at which other ranks may reach this one."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_logger = logging.getLogger("rankload")

#: Variables in which users name the network interfaces between nodes, the one that counts most first; and whether its
#: names are beginnings of interface names. NCCL's are ("Environment Variables", NCCL_SOCKET_IFNAME), gloo's are whole.
_VARIABLES = {"GLOO_SOCKET_IFNAME": False, "NCCL_SOCKET_IFNAME": True}

#: ioctl(2) that returns an interface's IPv4 address (linux/sockios.h). struct ifreq holds the name in 16 bytes, then
#: family, port and address.
_SIOCGIFADDR = 0x8915
_IFREQ_BYTES = 40
_ADDRESS_IN_IFREQ = slice(20, 24)

#: IPv6 addresses of this host: address, interface index, prefix length, scope, flags, name, in hex (proc(5)); and the
#: scope of addresses that other hosts can reach without naming an interface (include/net/ipv6.h).
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_GLOBAL_SCOPE = "00"


def own_addresses(store_host: str | None) -> list[str]:
    """Return this host's addresses, the likeliest first.

    The order: the interfaces that the user named, the source address of the route to the store, the addresses of the
    host name, the addresses of all interfaces, and loopback. Interfaces that the user excluded are left out. Loopback
    comes last because a host name may resolve to loopback on its own host. The address of a bridge may belong to
    another host elsewhere. The handshake tells the upstream rank whether it has reached the right process.

    Args:
        store_host: host of the job's store, which every rank can reach; None if unknown.
    """
    by_interface = interfaces()
    wishes = [wish for name, is_prefix in _VARIABLES.items() if (wish := _Wish.of(name, is_prefix)) is not None]
    named = [address for wish in wishes for address in wish.addresses(by_interface)]
    refused = {address for wish in wishes for address in wish.refused(by_interface)}
    all_addresses = [address for addresses in by_interface.values() for address in addresses]
    found = [*named, *_towards(store_host), *_of_host_name(), *all_addresses]
    usable = [address for address in found if not _is_loopback(address) and address not in refused]
    return [*dict.fromkeys(usable), "127.0.0.1"]


def interfaces() -> dict[str, list[str]]:
    """Return the addresses of each network interface that has one: IPv4 first, then global IPv6 ones."""
    found: dict[str, list[str]] = {}
    with suppress(OSError):
        for _, name in socket.if_nameindex():
            found[name] = [*_ipv4_address(name)]
    with suppress(OSError):
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope == _GLOBAL_SCOPE:
                found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return {name: addresses for name, addresses in found.items() if addresses}


@dataclass(frozen=True)
class _Wish:
    """A variable's choice of interfaces.

    Attributes:
        variable: name and value, for messages.
        names: names or beginnings of names.
        is_prefix: whether they are beginnings.
        excludes: whether these interfaces are not to be used.
    """

    variable: str
    names: tuple[str, ...]
    is_prefix: bool
    excludes: bool

    @classmethod
    def of(cls, variable: str, is_prefix: bool) -> _Wish | None:
        """Read a variable: ``eth,ib`` by beginnings, ``=eth0`` by names, ``^docker`` and ``^=docker0`` all others."""
        value = os.environ.get(variable, "").strip()
        excludes = value.startswith("^")
        text = value.removeprefix("^")
        names = tuple(name.partition(":")[0].strip() for name in text.removeprefix("=").split(",") if name.strip())
        return cls(f"{variable}={value}", names, is_prefix and not text.startswith("="), excludes) if names else None

    def addresses(self, by_interface: Mapping[str, list[str]]) -> list[str]:
        """Return the addresses of the interfaces that are named, in the order of the names."""
        if self.excludes:
            return []
        found = [address for name in self.names for address in self._of(name, by_interface)]
        if not found:
            _logger.warning("rankload: %s: no interface of this host (%s)", self.variable, ", ".join(by_interface))
        return found

    def refused(self, by_interface: Mapping[str, list[str]]) -> list[str]:
        """Return the addresses of the interfaces that are excluded."""
        return [address for name in self.names for address in self._of(name, by_interface)] if self.excludes else []

    def _of(self, wanted: str, by_interface: Mapping[str, list[str]]) -> Iterator[str]:
        for name, addresses in by_interface.items():
            if name.startswith(wanted) if self.is_prefix else name == wanted:
                yield from addresses


def _towards(host: str | None) -> Iterator[str]:
    if host is None:
        return
    with suppress(OSError, UnicodeError):
        for family, kind, *_, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # connect() of a datagram socket sends nothing; it only looks up the route
                yield probe.getsockname()[0]


def _of_host_name() -> Iterator[str]:
    with suppress(OSError, UnicodeError):  # such as a label of 64 characters, which no name in DNS has
        for *_, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            yield str(address[0])


def _ipv4_address(name: str) -> Iterator[str]:
    with suppress(ImportError, OSError):  # no IPv4 address
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[:15])
            yield socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[_ADDRESS_IN_IFREQ])


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
