"""The verdict: the one outcome of a call on all ranks. All are through, or the first cause of failure counts.

It is one key that is written once. Any rank may write a failure; success is rank 0's to write, for it alone knows
whether it stood still for so long that others have given it up. Every rank acts on what it reads back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from rankload._coordination.polling import backoff
from rankload._coordination.signals import Terminated
from rankload._coordination.store import RankStore
from rankload._types import Identity
from rankload.errors import CallCancelledError, RankFailedError, RankloadError, StoreLostError, from_wire, to_wire

_KEY = "verdict"
_SUCCESS = "{}"


class Verdict:
    """One call's verdict as this rank knows it. The heartbeat thread may look for it while the rank's own thread works.

    Attributes:
        is_known: whether this rank has read it.
        failure: the first cause, where it is one.
    """

    def __init__(self, store: RankStore, key: Callable[[str], str], identity: Identity) -> None:
        self._store, self._key, self._identity = store, key, identity
        self._looking = threading.Lock()  # or two threads would both acknowledge
        self.is_known = False
        self.failure: RankloadError | None = None

    def look(self) -> bool:
        """Return whether there is a verdict; reads and acknowledges it the first time."""
        with self._looking:
            if not self.is_known and (text := self._store.peek(self._key(_KEY))) is not None:
                self._take(text)
            return self.is_known

    def count_through(self) -> None:
        """Say that this rank is through with its part."""
        self._store.add(self._key("through"))

    def are_all_through(self) -> bool:
        """Return whether every rank is through with its part."""
        return self._store.add(self._key("through"), 0) >= self._identity.world_size

    def succeed(self) -> None:
        """Say that the call has succeeded, on rank 0; afterwards `failure` says if a rank has failed before."""
        self._decide(_SUCCESS)

    def fail(self, error: RankloadError) -> None:
        """Say why this rank fails; afterwards `failure` holds the first cause, unless the call succeeded before."""
        self._decide(_text_of_failure(error))

    def outlast_readers(self, patience_seconds: float) -> bool:
        """Keep the store's host here until the others have read the verdict, for the store dies with it; tell if so."""
        if not self._store.dies_with_rank_0 or self._identity.rank != 0:
            return True
        deadline = time.monotonic() + patience_seconds
        with suppress(StoreLostError):
            for _ in backoff(self._identity.world_size):
                if self._store.add(self._key("seen"), 0) >= self._identity.world_size - 1:
                    return True
                if time.monotonic() > deadline:
                    break
        return False

    def has_readers(self) -> bool:
        """Tell on rank 0 whether any other rank has read the verdict."""
        return self._store.add(self._key("seen"), 0) > 0

    def hurry(self, patience_seconds: float) -> None:
        """Wait no longer than this for the store from now on: the process is about to end."""
        self._store = self._store.in_a_hurry(patience_seconds)

    def _decide(self, text: str) -> None:
        with self._looking:
            if not self.is_known:
                self._take(self._store.set_first(self._key(_KEY), text))

    def _take(self, text: str) -> None:
        verdict = json.loads(text)
        if "error" in verdict:
            self.failure = from_wire(verdict["error"])
            self.failure.is_from_another_rank = self.failure.rank != self._identity.rank
        self.is_known = True
        if self._store.dies_with_rank_0 and self._identity.rank != 0:
            self._store.add(self._key("seen"))


def tell_failure(store: RankStore, prefix: str, error: RankloadError) -> None:
    """Give the verdict of a call that has failed without this session, for ranks that have yet to make it."""
    store.set_first(f"{prefix}/{_KEY}", _text_of_failure(error))


def _text_of_failure(error: RankloadError) -> str:
    return json.dumps({"error": to_wire(error)})


def as_shared_error(error: BaseException, identity: Identity) -> RankloadError:
    """Return what the other ranks are to raise, naming this one if it is the first to."""
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
    except Exception as problem:  # the others are to hear of it all the same
        return f"(no text: {type(problem).__name__} in its __str__)"
