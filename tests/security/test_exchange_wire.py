"""Somebody between two nodes that exchange a file: whole units that disappear, and messages that no node has sent."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoints import digest_of
from harness.origin import Origin
from harness.ranks import run_ranks
from rankload._fetch.exchange.frames import HEAD_BYTES, TAG_BYTES
from rankload._relay.handshake import ANSWER_BYTES, CONFIRMATION_BYTES, HELLO_BYTES

_UNIT_BYTES = 64 << 10


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        received += connection.recv(length - len(received)) or b"\0" * length
    return received


def _pass_on(begin: socket.socket, end: socket.socket) -> None:
    with suppress(OSError):
        while piece := begin.recv(1 << 16):
            end.sendall(piece)
    with suppress(OSError):
        end.shutdown(socket.SHUT_WR)


def _serve(server: socket.socket, port: int, attack: str) -> None:
    before, _ = server.accept()
    after = socket.create_connection(("127.0.0.1", port))
    after.sendall(_receive(before, HELLO_BYTES))
    answer = _receive(after, ANSWER_BYTES)
    if attack == "says that units need not be sent":
        answer += struct.pack("<20Q", *range(20))
    before.sendall(answer)
    threading.Thread(target=_pass_on, args=[after, before], daemon=True).start()
    after.sendall(_receive(before, CONFIRMATION_BYTES))
    if attack == "takes a unit away":
        _receive(before, HEAD_BYTES + _UNIT_BYTES + TAG_BYTES)
    _pass_on(before, after)


def _attack(attack: str) -> None:
    """Put somebody between this rank's listener and the node before."""
    from rankload._relay.listener import Listener

    way: Callable[[Listener], dict[str, Any]] = Listener.way.fget  # type: ignore[attr-defined]

    def way_through_attacker(listener: Listener) -> dict[str, Any]:
        true_way, server = way(listener), socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_serve, args=[server, true_way["port"], attack], daemon=True).start()
        return {**true_way, "addresses": ["127.0.0.1"], "port": server.getsockname()[1]}

    Listener.way = property(way_through_attacker)  # type: ignore[assignment]


def _load(rank: int, url: str, root: str, attack: str = "") -> tuple[str, str]:
    from rankload import RankloadError, dist_load_state_dict_from_url

    if rank == 1 and attack:
        _attack(attack)
    try:
        return "", digest_of(dist_load_state_dict_from_url(url, f"{root}/node{rank}", scope="exchange", timeout=8))
    except RankloadError as error:
        return type(error).__name__, str(error)


@pytest.mark.fault(93)
@pytest.mark.parametrize("has_file", [0, None])
@pytest.mark.parametrize("attack", ["takes a unit away", "says that units need not be sent"])
def test_unit_that_does_not_come_is_missed(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str, has_file: int | None
) -> None:
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(_UNIT_BYTES))
    torch.save({"w": torch.randn(700, 700)}, tmp_path / "big.pth")
    url = origin.add("big.pth", tmp_path / "big.pth")
    if has_file is not None:
        run_ranks(_load, 1, env="none", args=(url, str(tmp_path)))
    for result in run_ranks(_load, 2, nodes=2, args=(url, str(tmp_path), attack)):
        name, text = result.value
        assert name == "CoordinationError" and "something between the nodes" in text, text
    assert not (tmp_path / "node1" / "big.pth").exists()
