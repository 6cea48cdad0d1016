"""In a network of its own a test can be any host on any port, and nothing gets out."""

import os
import socket
from pathlib import Path

import pytest

from harness.certificates import Authority
from harness.namespace import BLACK_HOLE_IPV4, BLACK_HOLE_IPV6, namespace
from harness.nginx import nginx
from harness.squid import squid
from harness.waiting import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "model.pth").write_bytes(CONTENT)
    return folder


DOWNLOAD = """
import sys, urllib.request
print(len(urllib.request.urlopen(sys.argv[1]).read()))
"""


def test_a_test_can_be_github(root, tmp_path):
    authority = Authority(tmp_path)
    with (
        namespace({"github.com": "127.0.0.1"}) as network,
        nginx(root, tls=authority.certificate("github.com"), port=443, start=network.start_program) as server,
    ):
        url = "https://github.com/model.pth"
        result = network.run_script(DOWNLOAD, url, env=authority.environment).check()
        assert result.stdout == f"{len(CONTENT)}\n"
        [access] = server.wait_for_accesses(1)
        assert (access.host, access.status) == ("github.com", 200)


def test_two_hosts_on_one_port(root, tmp_path):
    authority = Authority(tmp_path)
    hosts = {"github.com": "127.0.0.1", "huggingface.co": "127.0.0.2"}
    with namespace(hosts) as network:
        for name, address in hosts.items():
            certificate = authority.certificate(name)
            with nginx(root, tls=certificate, address=address, port=443, start=network.start_program) as server:
                url = f"https://{name}/model.pth"
                network.run_script(DOWNLOAD, url, env=authority.environment).check()
                assert [access.host for access in server.wait_for_accesses(1)] == [name]


def test_a_proxy_resolves_names_that_the_client_cannot(root):
    with (
        namespace({"origin.example": "127.0.0.1"}) as network,
        nginx(root, port=80, start=network.start_program),
        squid(start=network.start_program) as proxy,
    ):
        network.run_script(DOWNLOAD, "http://origin.example/model.pth", env=proxy.environment).check()
        assert [access.url for access in proxy.wait_for_accesses(1)] == ["http://origin.example/model.pth"]


def test_outside_nothing_has_changed(tmp_path):
    hosts = Path("/etc/hosts").read_text()
    with namespace({"origin.example": "127.0.0.1"}) as network:
        assert "origin.example" in network.run_program(["cat", "/etc/hosts"]).check().stdout
        assert Path("/etc/hosts").read_text() == hosts
        # Another network's loopback is not this one's.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            refused = network.run_script(CONNECT, "127.0.0.1", str(port))
            assert "ConnectionRefusedError" in refused.stderr


CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.2)
"""


def test_nothing_gets_out():
    with namespace() as network:
        assert "gaierror" in network.run_script(CONNECT, "example.org", "80").stderr
        assert "Network is unreachable" in network.run_script(CONNECT, "198.51.100.1", "80").stderr


@pytest.mark.parametrize("address", [BLACK_HOLE_IPV4, BLACK_HOLE_IPV6])
def test_a_black_hole_is_silent(address):
    with namespace() as network:
        assert "TimeoutError: timed out" in network.run_script(CONNECT, address, "80").stderr


RESOLVE = """
import socket
print([entry[4][0] for entry in socket.getaddrinfo("origin.example", 80, type=socket.SOCK_STREAM)])
"""


def test_the_first_address_may_be_a_black_hole(root):
    with (
        namespace({"origin.example": [BLACK_HOLE_IPV6, "127.0.0.1"]}) as network,
        nginx(root, port=80, start=network.start_program),
    ):
        assert network.run_script(RESOLVE).check().stdout == f"{[BLACK_HOLE_IPV6, '127.0.0.1']}\n"
        # curl tries the other family after 200 ms (RFC 8305).
        result = network.run_program(["curl", "-sfv", "-o", os.devnull, "http://origin.example/model.pth"]).check()
        assert f"Trying [{BLACK_HOLE_IPV6}]" in result.stderr or f"Trying {BLACK_HOLE_IPV6}" in result.stderr
        assert "Connected to origin.example (127.0.0.1)" in result.stderr


def test_words_variables_and_the_working_directory_are_as_outside(tmp_path):
    with namespace() as network:
        program = ["sh", "-c", 'echo "$1 $COLOUR $(pwd)"', "sh", "two words"]
        assert network.run_program(program, env={"COLOUR": "red"}).stdout == f"two words red {os.getcwd()}\n"
        with network.start_program(program, working_dir=tmp_path) as started:
            assert started.wait(10).stdout == f"two words  {tmp_path}\n"


def test_it_ends_with_the_block():
    with namespace() as network, network.start_program(["sleep", "1000"]) as program:
        wait_until(lambda: b"sleep" in Path(f"/proc/{program.pid}/cmdline").read_bytes()[:5], 10, "nsenter made way")
        inside = os.readlink(f"/proc/{program.pid}/ns/net")
        assert inside != os.readlink("/proc/self/ns/net")
    assert inside not in {_network(pid) for pid in Path("/proc").glob("[0-9]*")}


def _network(process):
    try:
        return os.readlink(process / "ns" / "net")
    except OSError:
        return ""
