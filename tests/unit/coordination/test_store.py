"""The store's client, where the server does not answer."""

from __future__ import annotations

import pytest
from torch.distributed import TCPStore

from harness.rank import mark
from harness.ranks import start_ranks
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
