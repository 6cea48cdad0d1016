"""Wait for a key of the store: the server answers when the key is there, so that a wait costs the same however long."""

from __future__ import annotations

import atexit
import time
from contextlib import suppress

from typing_extensions import Self

from rankload._coordination.store import RankStore
from rankload._platform.daemon_threads import Job
from rankload.errors import StoreLostError

#: Value of a key that a rank has given up waiting for.
GIVEN_UP = ""


class AwaitedKey:
    """One wait of this rank for one key. A context manager: an error inside gives the wait up.

    A pending request blocks its client. So the wait has a client of its own. Without one, each round polls the key.

    Only a value ends a pending request. A rank that gives up therefore writes `GIVEN_UP` unless there is a value. That
    also wakes the other ranks that wait for this key, whose call has failed as well.

    Args:
        store: this rank's client for everything else.
        waiting: client that may be blocked; None to poll.
        key: full name of the key.
        round_seconds: time between two rounds of a wait that the server will answer. Signal handlers run at once.
        is_write_once: whether giving up must write nothing: this rank will write the key itself.

    Attributes:
        text: value of the key; None while it does not exist.
    """

    def __init__(
        self,
        store: RankStore,
        waiting: RankStore | None,
        key: str,
        round_seconds: float,
        *,
        is_write_once: bool = False,
    ) -> None:
        self._store, self._waiting, self._key, self._is_write_once = store, waiting, key, is_write_once
        self._round_seconds = round_seconds
        self._request: Job | None = None
        self.text: str | None = None

    def __enter__(self) -> Self:
        self._request = self._waiting.request(self._key) if self._waiting is not None else None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or self._waiting is None or self._request is None or self._request.has_ended:
            return
        atexit.unregister(self._waiting.sever)  # register only once
        atexit.register(self._waiting.sever)  # does nothing if the request has ended by then
        if not self._is_write_once:
            with suppress(StoreLostError):
                self._store.settle(self._key, GIVEN_UP)

    def is_there(self) -> bool:
        """Return whether the key exists; then `text` is its value."""
        if self._request is None:
            self.text = self._store.peek_requested(self._key)
        elif self._request.has_ended:
            if self._request.error is None:
                self.text = self._request.value.decode()
            else:  # the store is lost, which polls will tell; or the request has expired after weeks
                self._request = None
        return self.text is not None

    def sleep(self, seconds: float) -> None:
        """Sleep until the server answers or a round is over; for ``seconds`` if this wait polls."""
        if self._request is None:
            time.sleep(seconds)
        else:
            self._request.ends_within(self._round_seconds)
