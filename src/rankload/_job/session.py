"""Sessions: the same ranks, told apart from whoever used the store before.

Restart counters cannot be trusted: TORCHELASTIC_RESTART_COUNT differs between nodes after a restart, torchrun keeps a
store's keys across restarts, SLURM keeps the job id across a requeue. So every rank says hello with a nonce that
nobody has used before, and rank 0 answers the nonce with the session's random id. Old keys are never read.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from rankload._errors import ArrivalTimeoutError, StoreLostError
from rankload._job.store import RankStore
from rankload._settings import Settings
from rankload._types import Identity

_logger = logging.getLogger("rankload")


@dataclass
class Session:
    """What the calls of one set of ranks share.

    Attributes:
        store: the ranks' store.
        identity: who this rank is among them.
        prefix: start of every key of this session.
        pid: the process that joined; a forked child must not use its parent's connection.
        calls: number of calls made; equal on all ranks, since every rank makes every call.
        remembered: facts that stay true for the session (which directories are shared).
    """

    store: RankStore
    identity: Identity
    prefix: str
    pid: int = field(default_factory=os.getpid)
    calls: int = 0
    remembered: dict[str, str] = field(default_factory=dict)

    def next_call_prefix(self) -> str:
        """Return the key prefix of this rank's next call."""
        self.calls += 1
        return f"{self.prefix}/{self.calls}"


def join(store: RankStore, identity: Identity, group_name: str, settings: Settings) -> Session:
    """Agree on a session id with rank 0. Collective over the ranks of the group, but rank 0 does not wait.

    Raises:
        ArrivalTimeoutError: rank 0 did not answer within ``settings.arrival_seconds``.
    """
    root = f"rankload/{group_name}"
    if identity.rank == 0:
        session_id = secrets.token_hex(8)
        _Greeter(store, root, session_id, identity.world_size - 1).start()
    else:
        session_id = _say_hello(store, root, identity, settings)
    return Session(store, identity, f"{root}/{session_id}")


def _say_hello(store: RankStore, root: str, identity: Identity, settings: Settings) -> str:
    nonce = secrets.token_hex(8)
    store.set(f"{root}/hello/{store.add(f'{root}/hellos')}", nonce)
    started = reported = time.monotonic()
    for _ in backoff(identity.world_size):
        if session_id := store.peek(f"{root}/answer/{nonce}"):
            store.add(f"{root}/{session_id}/joined")
            return session_id
        now = time.monotonic()
        if now - started > settings.arrival_seconds:
            break
        if now - reported > settings.report_seconds:
            reported = now
            _logger.warning("rank %d: rank 0 has not made the call yet (%.0f s)", identity.rank, now - started)
    raise ArrivalTimeoutError(
        f"rank 0 did not make the call within {settings.arrival_seconds:g} s: every rank of the group must make it",
        missing="0",
    )


class _Greeter(threading.Thread):
    """Rank 0's thread that answers hellos until every rank has joined.

    One counter numbers the hellos, so a look costs one operation however many ranks there are. Hellos that a former
    session left behind are answered too; nobody reads those answers.
    """

    def __init__(self, store: RankStore, root: str, session_id: str, expected: int) -> None:
        super().__init__(name="rankload-greeter", daemon=True)
        self._store, self._root, self._session_id, self._expected = store, root, session_id, expected
        self._stop_requested = threading.Event()

    def start(self) -> None:
        # a daemon thread that wakes up inside torch while the interpreter is torn down aborts the process
        atexit.register(self.stop)
        super().start()

    def stop(self) -> None:
        self._stop_requested.set()
        self.join(timeout=5)

    def run(self) -> None:
        seen, unanswered = 0, set[int]()
        with suppress(StoreLostError):  # the rank's own calls report it
            for _ in backoff(self._expected, sleep=self._stop_requested.wait):
                count = self._store.add(f"{self._root}/hellos", 0)
                unanswered.update(range(seen + 1, count + 1))
                seen = count
                unanswered = {number for number in unanswered if not self._answer(number)}
                has_everybody = self._store.add(f"{self._root}/{self._session_id}/joined", 0) >= self._expected
                if has_everybody or self._stop_requested.is_set():
                    break
        atexit.unregister(self.stop)

    def _answer(self, number: int) -> bool:
        # the counter runs ahead of the nonce for a moment, and for good when that rank died in between
        nonce = self._store.peek(f"{self._root}/hello/{number}")
        if nonce is not None:
            self._store.set(f"{self._root}/answer/{nonce}", self._session_id)
        return nonce is not None


def backoff(world_size: int, sleep: Callable[[float], object] = time.sleep) -> Iterator[float]:
    """Yield for ever, sleeping from 1 ms up to max(250 ms, world_size / 4000 s) between two rounds.

    The growth of a third keeps the time lost by sleeping below a third of the time waited; the ceiling keeps 4000
    polling ranks below 4000 operations a second, a few percent of what a TCPStore serves.
    """
    delay, ceiling = 0.001, max(0.25, world_size / 4000)
    while True:
        yield delay
        sleep(delay)
        delay = min(delay * 4 / 3, ceiling)
