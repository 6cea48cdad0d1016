"""No two tests get the same port."""

import socket

from harness import ports
from harness.ports import reserved_port
from harness.ranks import run_ranks


def test_a_reserved_port_is_nobody_elses(monkeypatch):
    with reserved_port() as first:
        monkeypatch.setattr(ports, "_FIRST", first)
        monkeypatch.setattr(ports, "_LAST", first + 20)
        for _ in range(50):
            with reserved_port() as second:
                assert second != first


def reserve_from(rank, first):
    ports._FIRST, ports._LAST = first, first + 20
    seen = set()
    for _ in range(50):
        with reserved_port() as port:
            seen.add(port)
    return seen


def test_nor_another_processs():
    with reserved_port() as port:
        [result] = run_ranks(reserve_from, 1, env="none", args=(port,))
    assert port not in result.value


def test_a_port_with_a_listener_is_not_given(monkeypatch):
    with reserved_port() as port, socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        monkeypatch.setattr(ports, "_FIRST", port)
        monkeypatch.setattr(ports, "_LAST", port + 20)
        # The claim on the name is not what keeps it away here.
        monkeypatch.setattr(ports, "_CLAIM", "another-name-{port}")
        for _ in range(50):
            with reserved_port() as other:
                assert other != port


def test_a_port_comes_back():
    with reserved_port() as port:
        pass
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
