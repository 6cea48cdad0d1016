"""The channel of one rank, where the others are played by what is in the store."""

from __future__ import annotations

from torch.distributed import HashStore

from rankload._coordination.rank_channel import RankChannel
from rankload._coordination.rendezvous import Calls, Session
from rankload._coordination.store import RankStore
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import RankLostError


def test_after_the_verdict_a_rank_that_has_left_is_not_lost() -> None:
    """The pulse looks at the others while the rank's own thread is slow to come."""
    store = RankStore(HashStore(), "memory", False, 30)
    session = Session(store, Identity(1, 2, None, None, None, "here", "test"), "session", Calls(1))
    with RankChannel(session, Settings()) as channel:
        store.set("session/1/verdict", "{}")
        channel._look_around()
        channel._note_failure(RankLostError("rank 0 has given no sign of life"))
    assert not session.is_over
