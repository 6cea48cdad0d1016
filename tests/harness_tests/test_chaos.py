"""The proxy spoils connections as told, at the byte, and otherwise passes everything on."""

import http.client
import socket
import ssl
import threading
import time

import pytest

from harness.certificates import Authority
from harness.chaos import Fault, chaos
from harness.client import get
from harness.nginx import nginx

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def connect(port, request=b"GET /x HTTP/1.0\r\n\r\n"):
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(request)
    return client


def read_to_the_end(client):
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def test_without_a_fault_all_passes(origin):
    url = origin.add("x", CONTENT)
    with chaos(origin.port) as link:
        assert get(link.through(url) + "?key=a")[2] == CONTENT
        link.wait_until_closed()
        [connection] = link.connections
    assert connection.bytes_down > len(CONTENT)
    assert 0 < connection.bytes_up < 1000
    assert origin.requests("x")[0].query == "key=a"


def test_kept_connections_pass_too(origin):
    origin.add("x", CONTENT)
    with chaos(origin.port) as link:
        connection = http.client.HTTPConnection("127.0.0.1", link.port, timeout=20)
        for _ in range(3):
            connection.request("GET", "/x")
            assert connection.getresponse().read() == CONTENT
        connection.close()
        link.wait_until_closed()
        assert len(link.connections) == 1


@pytest.mark.parametrize("at", [0, 1, 300_000])
def test_a_cut_at_the_byte(origin, at):
    origin.add("x", CONTENT)
    with chaos(origin.port, Fault(cut_at=at)) as link, connect(link.port) as client:
        assert len(read_to_the_end(client)) == at
        link.wait_until_closed()
        assert link.connections[0].bytes_down == at


@pytest.mark.parametrize("at", [0, 1, 300_000])
def test_a_reset_at_the_byte(origin, at):
    origin.add("x", CONTENT)
    with (
        chaos(origin.port, Fault(reset_at=at)) as link,
        pytest.raises(ConnectionResetError),
        connect(link.port) as client,
    ):
        read_to_the_end(client)
    assert link.connections[0].bytes_down == at


def test_a_stall_until_the_client_gives_up(origin):
    origin.add("x", CONTENT)
    with chaos(origin.port, Fault(stall_at=1000)) as link:
        with connect(link.port) as client:
            client.settimeout(None)  # or it would not wait for all
            assert len(client.recv(1000, socket.MSG_WAITALL)) == 1000
            link.wait_until_stalled()
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
        link.wait_until_closed()
    assert link.connections[0].bytes_down == 1000


def test_a_stall_that_is_released(origin):
    origin.add("x", CONTENT)
    with chaos(origin.port, Fault(stall_at=1000)) as link:
        with connect(link.port) as client:
            link.wait_until_stalled()
            link.release()
            assert read_to_the_end(client).endswith(CONTENT)
        assert get(link.through(origin.url("x")))[2] == CONTENT


def test_one_fault_for_each_connection_in_turn(origin):
    url = origin.add("x", CONTENT)
    with chaos(origin.port, Fault(cut_at=0), Fault(reset_at=0), Fault()) as link:
        with pytest.raises(http.client.RemoteDisconnected):
            get(link.through(url))
        with pytest.raises(ConnectionResetError):
            get(link.through(url))
        assert get(link.through(url))[2] == get(link.through(url))[2] == CONTENT


def test_latency_is_that_of_every_round_trip(origin):
    origin.add("x", CONTENT)
    with chaos(origin.port, Fault(latency_seconds=0.1)) as link:
        connection = http.client.HTTPConnection("127.0.0.1", link.port, timeout=20)
        started = time.perf_counter()
        for _ in range(3):
            connection.request("GET", "/x")
            connection.getresponse().read()
        assert 0.3 < time.perf_counter() - started < 10
        connection.close()


def test_a_rate(origin):
    url = origin.add("x", CONTENT)
    with chaos(origin.port, Fault(bytes_per_second=4 * len(CONTENT))) as link:
        started = time.perf_counter()
        assert get(link.through(url))[2] == CONTENT
        assert 0.24 < time.perf_counter() - started < 10


def test_below_tls(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    authority = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=str(authority.path))
    with (
        nginx(tmp_path, tls=authority.certificate("127.0.0.1")) as server,
        chaos(server.port, Fault(cut_at=300_000), Fault()) as link,
    ):
        url = link.through(server.url("x"))
        with pytest.raises((ssl.SSLEOFError, http.client.IncompleteRead)):
            get(url, trust=trust)
        assert get(url, trust=trust)[2] == CONTENT


def test_a_server_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with chaos(port) as link, pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        get(f"http://127.0.0.1:{link.port}/x")


@pytest.mark.parametrize("fault", [Fault(stall_at=10), Fault(latency_seconds=1000), Fault(bytes_per_second=1)])
def test_leaving_ends_what_runs(origin, fault):
    origin.add("x", CONTENT)
    before = threading.active_count()
    with chaos(origin.port, fault) as link:
        client = connect(link.port)
        origin.wait_for_requests("x", 1)
    with client:
        assert len(read_to_the_end(client)) < 100
    assert not link.connections[0].is_open
    origin.wait_until_idle()
    assert threading.active_count() <= before + 1  # the origin's own for the connection may still be leaving
