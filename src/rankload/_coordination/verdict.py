"""The verdict: the one outcome of a call on all ranks. Either all ranks are through, or the first failure counts.

The verdict is one write-once key. Any rank may write a failure. Only rank 0 may write success: it alone knows whether
it stood still for so long that others have given it up. Every rank acts on the value that it reads back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from rankload._coordination.awaited_key import AwaitedKey
from rankload._coordination.polling import backoff
from rankload._coordination.signals import Terminated
from rankload._coordination.store import RankStore
from rankload._types import Identity
from rankload.errors import CallCancelledError, RankFailedError, RankloadError, StoreLostError, from_wire, to_wire

_KEY = "verdict"
_SUCCESS = "{}"


class Verdict:
    """One call's verdict, as far as this rank knows it.

    The heartbeat thread may look for the verdict while the rank's own thread works.

    Attributes:
        is_known: whether this rank has read the verdict.
        failure: the first failure; None if there is none, or the verdict is not known yet.
    """

    def __init__(self, store: RankStore, key: Callable[[str], str], identity: Identity) -> None:
        self._store, self._key, self._identity = store, key, identity
        self._looking = threading.Lock()  # without the lock, two threads could both acknowledge
        self.is_known = False
        self.failure: RankloadError | None = None

    def look(self) -> bool:
        """Return whether there is a verdict. The first time, read and acknowledge it."""
        with self._looking:
            if not self.is_known and (text := self._store.peek_requested(self._key(_KEY))) is not None:
                self._take(text)
            return self.is_known

    def await_key(self, waiting: RankStore | None, round_seconds: float) -> AwaitedKey:
        """Return a wait for the verdict, for `read`."""
        return AwaitedKey(self._store, waiting, self._key(_KEY), round_seconds, is_write_once=True)

    def read(self, awaited: AwaitedKey) -> bool:
        """Like `look`, if the wait for the verdict has ended."""
        with self._looking:
            if not self.is_known and awaited.is_there() and awaited.text is not None:
                self._take(awaited.text)
            return self.is_known

    def count_through(self) -> None:
        """Count this rank as through with its part of the call."""
        self._store.add(self._key("through"))

    def are_all_through(self) -> bool:
        """Return whether every rank is through with its part of the call."""
        return self._store.add(self._key("through"), 0) >= self._identity.world_size

    def succeed(self) -> None:
        """Write success, on rank 0. Afterwards `failure` holds the error of a rank that failed before."""
        self._decide(_SUCCESS)

    def fail(self, error: RankloadError) -> None:
        """Write this rank's failure. Afterwards `failure` holds the first one, unless the call succeeded before."""
        self._decide(_text_of_failure(error))

    def outlast_readers(self, patience_seconds: float) -> bool:
        """If the store dies with this process, wait up to a limit until all other ranks have read the verdict.

        Returns:
            Whether the process may exit: all others have read the verdict, or the store is elsewhere.
        """
        if not self._store.dies_with_rank_0 or self._identity.rank != 0:
            return True
        deadline = time.monotonic() + patience_seconds
        with suppress(StoreLostError):
            for _ in backoff(1):  # no other rank polls
                if self._store.add(self._key("seen"), 0) >= self._identity.world_size - 1:
                    return True
                if time.monotonic() > deadline:
                    break
        return False

    def has_readers(self) -> bool:
        """Return, on rank 0, whether any other rank has read the verdict."""
        return self._store.add(self._key("seen"), 0) > 0

    def hurry(self, patience_seconds: float) -> None:
        """Limit every further wait for the store: the process is about to exit."""
        self._store = self._store.in_a_hurry(patience_seconds)

    def _decide(self, text: str) -> None:
        with self._looking:
            if not self.is_known:
                self._take(self._store.settle(self._key(_KEY), text))

    def _take(self, text: str) -> None:
        verdict = json.loads(text)
        if "error" in verdict:
            self.failure = from_wire(verdict["error"])
            self.failure.is_from_another_rank = self.failure.rank != self._identity.rank
        self.is_known = True
        if self._store.dies_with_rank_0 and self._identity.rank != 0:
            self._store.add(self._key("seen"))


def tell_failure(store: RankStore, prefix: str, error: RankloadError) -> None:
    """Write the verdict of a call that failed before this session, for ranks that have yet to make that call."""
    store.settle(f"{prefix}/{_KEY}", _text_of_failure(error))


def _text_of_failure(error: RankloadError) -> str:
    return json.dumps({"error": to_wire(error)})


def as_shared_error(error: BaseException, identity: Identity) -> RankloadError:
    """Return the error that the other ranks will raise. It names this rank, unless it already names another."""
    if isinstance(error, RankloadError):
        shared: RankloadError = error
    elif isinstance(error, Exception):
        shared = RankFailedError(f"{type(error).__name__}: {_text_of(error)}", cause_type=type(error).__name__)
    else:
        name = "SIGTERM" if isinstance(error, Terminated) else type(error).__name__
        shared = CallCancelledError(f"a rank left the call on {name}")
    if shared.rank is None:
        shared.rank, shared.host = identity.rank, identity.host
    return shared


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception as problem:  # the failure itself must reach the other ranks
        return f"(no text: {type(problem).__name__} in its __str__)"
