"""Which addresses a rank announces, and at which ports it listens."""

from __future__ import annotations

import ast
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from harness.namespace import Namespace, namespace
from rankload._relay import addresses
from rankload._relay.addresses import own_addresses
from rankload._relay.listener import Listener
from rankload._settings import ports_to_try
from rankload.errors import ArgumentError, CoordinationError

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.5", "2001:db8::5"],
    "ib0": ["10.1.0.5"],
    "ib1": ["2001:db8:1::5"],
    "docker0": ["172.17.0.1"],
}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "interfaces", lambda: INTERFACES)
    monkeypatch.setattr(addresses, "_of_host_name", lambda: iter(["10.0.0.5"]))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)


ALL = ["10.0.0.5", "2001:db8::5", "10.1.0.5", "2001:db8:1::5", "172.17.0.1", "127.0.0.1"]


@pytest.mark.parametrize(
    ("nccl", "gloo", "first", "missing"),
    [
        ("", "", ["10.0.0.5"], []),
        ("ib", "", ["10.1.0.5", "2001:db8:1::5"], []),
        ("ib0,eth", "", ["10.1.0.5", "10.0.0.5", "2001:db8::5"], []),
        ("=ib1", "", ["2001:db8:1::5"], []),
        ("=ib", "", ["10.0.0.5"], []),
        ("", "ib0", ["10.1.0.5"], []),
        ("", "ib", ["10.0.0.5"], []),  # gloo's names are whole
        ("ib", "eth0", ["10.0.0.5", "2001:db8::5", "10.1.0.5", "2001:db8:1::5"], []),
        ("^docker,lo", "", ["10.0.0.5"], ["172.17.0.1"]),
        ("^=docker", "", ["10.0.0.5"], []),
        ("^=docker0", "", ["10.0.0.5"], ["172.17.0.1"]),
        ("^eth", "", ["10.1.0.5"], ["10.0.0.5", "2001:db8::5"]),
        ("eth0:1", "", ["10.0.0.5", "2001:db8::5"], []),
    ],
)
def test_interfaces_that_the_user_names(
    monkeypatch: pytest.MonkeyPatch, nccl: str, gloo: str, first: list[str], missing: list[str]
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    found = own_addresses(None)
    assert found[: len(first)] == first and found[-1] == "127.0.0.1"
    assert sorted(found) == sorted(set(ALL) - set(missing))


@pytest.mark.parametrize("store_host", [None, "no.such.host.invalid", "127.0.0.1"])
def test_loopback_comes_last(store_host: str | None) -> None:
    assert own_addresses(store_host)[-1] == "127.0.0.1"


def test_name_of_no_interface_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mlx")
    own_addresses(None)
    assert "NCCL_SOCKET_IFNAME=mlx: no interface of this host (lo, eth0, ib0, ib1, docker0)" in caplog.text


@pytest.fixture
def network() -> Iterator[Namespace]:
    with namespace() as made:
        made.run_program(
            ["sh", "-euc", "ip link add ib0 type veth peer name ib0peer; ip address add 10.1.0.5/24 dev ib0;"
             "ip address add 2001:db8:1::5/64 dev ib0 nodad; ip link set ib0 up; ip link set ib0peer up"],
            env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
        ).check()  # fmt: skip
        yield made


def test_addresses_of_real_interfaces(network: Namespace) -> None:
    code = "from rankload._relay.addresses import *; print(interfaces()); print(own_addresses(None))"
    result = network.run_script(code, env={"NCCL_SOCKET_IFNAME": "ib"}).check()
    found, own = map(ast.literal_eval, result.stdout.splitlines())
    assert found["ib0"] == ["10.1.0.5", "2001:db8:1::5"]  # link-local addresses lead nowhere without the interface
    assert own[:2] == ["10.1.0.5", "2001:db8:1::5"]


NAMED_OTHERWISE = """
import ctypes, socket, sys
from rankload._relay.addresses import own_addresses
assert ctypes.CDLL(None).unshare(0x4000000) == 0  # CLONE_NEWUTS: the name is this process's alone
socket.sethostname(sys.argv[1])
print(own_addresses(sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["n" * 64, "node..3"])
def test_host_name_that_is_no_name_in_dns(network: Namespace, name: str) -> None:
    result = network.run_script(NAMED_OTHERWISE, name).check()
    assert "10.1.0.5" in ast.literal_eval(result.stdout)


BOTH_ENDS = """
import sys, threading
from rankload._relay.links import connect
from rankload._relay.listener import Listener
listener = Listener([sys.argv[1]])
thread = threading.Thread(target=lambda: listener.accept(0, "here", lambda: None).socket.close())
thread.start()
connect(1, "there", listener.way, 5, lambda: None).socket.close()
thread.join()
print(listener.way["port"])
"""


@pytest.mark.parametrize("address", ["10.1.0.5", "2001:db8:1::5"])
def test_ranks_reach_one_another_at_the_ports_that_are_allowed(network: Namespace, address: str) -> None:
    result = network.run_script(BOTH_ENDS, address, env={"RANKLOAD_PORTS": "29600-29602"}).check()
    assert int(result.stdout) in range(29600, 29603)


@pytest.mark.parametrize(
    ("text", "ports"), [("", {0}), ("29600", {29600}), ("29600-29602", {29600, 29601, 29602}), (" 7 - 8 ", {7, 8})]
)
def test_range_of_ports(text: str, ports: set[int]) -> None:
    assert set(ports_to_try({"RANKLOAD_PORTS": text})) == ports


@pytest.mark.parametrize("text", ["x", "1-", "-1", "0-5", "9-8", "1-70000", "1-2-3", "29600,29601", "9" * 99])
def test_what_is_no_range_of_ports(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"RANKLOAD_PORTS=.*expected a range of ports, such as 29600-29699"):
        ports_to_try({"RANKLOAD_PORTS": text})


def test_all_allowed_ports_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RANKLOAD_PORTS", str(other.getsockname()[1]))
        with pytest.raises(CoordinationError, match=r"Address already in use.*a wider RANKLOAD_PORTS"):
            Listener(["127.0.0.1"])


def test_next_port_where_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr("rankload._settings.random.shuffle", lambda ports: None)
        monkeypatch.setenv("RANKLOAD_PORTS", f"{taken}-{min(taken + 50, 65535)}")
        with closing(Listener(["127.0.0.1"])) as listener:
            assert taken < listener.way["port"] <= taken + 50
