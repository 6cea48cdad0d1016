"""The store's client, where the server does not answer."""

from __future__ import annotations

import errno
import os
import socket
from typing import NoReturn

import pytest
from torch.distributed import TCPStore

from harness.rank import mark
from harness.ranks import start_ranks
from harness.scripts import run_script
from rankload._coordination import store as stores
from rankload._coordination.store import RankStore
from rankload.errors import StoreLostError


def _host(rank: int) -> None:
    import signal

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mark("listening", store.port)
    signal.pause()


def test_call_that_a_frozen_server_holds_is_ended_at_the_end_of_the_process() -> None:
    """Should it be answered while the interpreter is torn down, the process would abort."""
    with start_ranks(_host, 1, env="none") as server:
        [port] = server.wait_for_mark("listening")
        store = RankStore(TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), "there", True, 0.5)
        store.set("key", "value")
        server.stop(0)
        with pytest.raises(StoreLostError):
            store.peek("key")
        assert not store._calls.ends_overdue_call(0)
        store.sever()
        assert store._calls.ends_overdue_call(0)


TORN_DOWN_SLOWLY = """
import torch.distributed  # before what is to be released after it
import builtins, time
from rankload._coordination.store import connect
from rankload._settings import Settings
from rankload.errors import StoreLostError

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(6)

builtins.slow = Slow()  # released when the interpreter is torn down; the lock is free meanwhile
try:
    connect("127.0.0.1", {port}, Settings(), dies_with_rank_0=True, limit_seconds=3)
except StoreLostError:
    print("lost")
"""


def test_a_client_that_still_tries_when_the_interpreter_is_torn_down_does_not_abort_the_process() -> None:
    """torch tries for 3 s and more. The look finds after 1 s that nobody listens; the process waits 2 s, and ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = run_script(TORN_DOWN_SLOWLY.format(port=port))
    assert (result.stdout, result.exitcode) == ("lost\n", 0), result.stderr


def test_severing_needs_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        monkeypatch.setattr(os, "listdir", none_left)
        monkeypatch.setattr(os, "dup", none_left)
        for descriptor in stores._open_descriptors():
            stores._shut_down(descriptor, server.getsockname()[1])
        with accepted:
            assert accepted.recv(1) == b""
        assert client.fileno() >= 0, "it stays open: its owner closes it"


def none_left(*_: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
