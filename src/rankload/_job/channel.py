"""One call of all ranks: agreement on the way in, values between ranks on the way, one verdict on the way out.

A warm call costs a rank six store operations: the agreement, the leader's word (where the file is, who shares it),
the fetched file, its own success, the verdict, and "seen" where the store lives in rank 0's process. A wait costs
one operation a poll.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from rankload._errors import (
    ArgumentMismatchError,
    CallCancelledError,
    RankFailedError,
    RankloadError,
    cut,
    from_wire,
    to_wire,
)
from rankload._job.session import Session, backoff
from rankload._job.signals import TerminationAsException
from rankload._job.status import Pulse, Watch
from rankload._job.vigil import Vigil
from rankload._settings import Settings
from rankload._types import Identity, Progress

#: How long rank 0 keeps the store open at the end of a call for ranks that have not read the verdict.
_FAREWELL_SECONDS = 5.0


class LoneChannel:
    """The channel of a single process: nobody to agree with, nobody to wait for."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._termination = TerminationAsException()
        self._on_exit: list[Callable[[], None]] = []

    def agree(self, arguments: dict[str, Any]) -> None:
        """Nobody disagrees."""

    def report(self, progress: Progress) -> None:
        """Nobody listens."""

    def post(self, key: str, value: dict[str, Any]) -> None:
        """Nobody reads."""

    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        """Unreachable: a single process leads every domain."""
        raise AssertionError("a single process waits for nobody")

    def has(self, key: str) -> bool:
        """Nobody posts."""
        return False

    def claim(self, key: str) -> int:
        """Every claim is this process's."""
        return self.identity.rank

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Run something when the call ends."""
        self._on_exit.append(callback)

    def remember(self, fact: str, value: str | None = None) -> str | None:
        """Nothing is worth remembering."""
        return None

    def __enter__(self) -> LoneChannel:
        self._termination.install()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        _run_all(self._on_exit)
        self._termination.restore(error)


class RankChannel:
    """The channel of one call in one rank of several. Use as a context manager; leaving it is the verdict."""

    def __init__(self, session: Session, settings: Settings) -> None:
        self.identity = session.identity
        self._session, self._settings = session, settings
        self._store, self._prefix = session.store, session.next_call_prefix()
        self._failure: RankloadError | None = None
        self._on_exit: list[Callable[[], None]] = []
        self._termination = TerminationAsException()
        self._pulse = Pulse(
            self._store,
            self._key(f"status/{self.identity.rank}"),
            self.identity,
            settings.heartbeat_seconds,
            self._look_for_failure,
        )

    def agree(self, arguments: dict[str, Any]) -> None:
        """Check that every rank passed the same arguments: each compares its own with the first writer's.

        Raises:
            ArgumentMismatchError: they differ; names both ranks and both values.
        """
        mine = {"rank": self.identity.rank, "host": self.identity.host, "arguments": arguments}
        first = json.loads(self._store.set_first(self._key("arguments"), json.dumps(mine)))
        differing = [name for name in arguments if first["arguments"].get(name) != arguments[name]]
        if differing or first["arguments"].keys() != arguments.keys():
            details = "; ".join(
                f"{name}: rank {first['rank']} has {first['arguments'].get(name)!r}, "
                f"rank {self.identity.rank} has {arguments[name]!r}"
                for name in differing
            )
            raise ArgumentMismatchError(
                f"ranks disagree on the arguments of call {self._session.calls} ({details}): every rank must make the "
                "same calls in the same order",
                first_rank=first["rank"],
                other_rank=self.identity.rank,
            )

    def report(self, progress: Progress) -> None:
        """Publish this rank's progress; raise what another rank failed with."""
        if self._failure is not None:
            raise self._failure
        self._pulse.beat(progress)

    def post(self, key: str, value: dict[str, Any]) -> None:
        """Publish a value under a key of this call."""
        self._store.set(self._key(key), json.dumps(value))

    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        """Wait for a posted value, watching over the rank that is to post it (see `Channel`)."""
        text = self._store.peek(self._key(key))  # a warm call finds it at once, or after a few polls
        if text is None:
            text = self._wait(key, Vigil([self._watch(from_rank)], self._settings, self.identity))
        return json.loads(text)  # type: ignore[no-any-return]

    def has(self, key: str) -> bool:
        """Tell whether a value was posted, without waiting."""
        return self._store.peek(self._key(key)) is not None

    def claim(self, key: str) -> int:
        """Return the rank that claimed the key first."""
        return int(self._store.set_first(self._key(key), str(self.identity.rank)))

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Run something when the call ends on this rank, after the verdict."""
        self._on_exit.append(callback)

    def remember(self, fact: str, value: str | None = None) -> str | None:
        """Keep a fact for later calls of the session, or recall it."""
        if value is not None:
            self._session.remembered[fact] = value
        return self._session.remembered.get(fact)

    def __enter__(self) -> RankChannel:
        self._termination.install()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
            else:
                self._fail(error)
        except BaseException as late_error:
            error = late_error
            raise
        finally:
            self._pulse.stop()
            _run_all(self._on_exit)
            self._termination.restore(error)

    def _finish(self) -> None:
        """Say that this rank is through, and wait until all are or one has failed."""
        if self._store.add(self._key("through")) == self.identity.world_size:
            self._store.set_first(self._key("verdict"), "{}")
        text = self._store.peek(self._key("verdict")) or self._wait("verdict", self._vigil_over_everybody())
        self._take_leave()
        self._raise_verdict(text)

    def _fail(self, error: BaseException) -> None:
        """Publish why this rank fails, unless another failed first; raise the first cause."""
        mine = self._as_shared_error(error)
        text = self._store.set_first(self._key("verdict"), json.dumps({"error": to_wire(mine)}))
        self._take_leave()
        if isinstance(error, Exception):
            first = from_wire(json.loads(text)["error"]) if text != "{}" else mine
            is_mine = (first.message, first.rank) == (cut(mine.message), mine.rank)
            if is_mine and mine is error:
                return  # let the original fly on, with its traceback
            raise (mine if is_mine else first) from error

    def _as_shared_error(self, error: BaseException) -> RankloadError:
        if isinstance(error, RankloadError):
            shared: RankloadError = error
        elif isinstance(error, Exception):
            shared = RankFailedError(f"{type(error).__name__}: {error}", cause_type=type(error).__name__)
        else:
            shared = CallCancelledError(f"a rank left the call on {self._termination.name_of(error)}")
        if shared.rank is None:
            shared.rank, shared.host = self.identity.rank, self.identity.host
        return shared

    def _take_leave(self) -> None:
        """Keep the store's host from leaving before the others have read the verdict."""
        if not self._store.dies_with_rank_0:
            return
        if self.identity.rank != 0:
            self._store.add(self._key("seen"))
            return
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for _ in backoff(self.identity.world_size):
            if self._store.add(self._key("seen"), 0) >= self.identity.world_size - 1 or time.monotonic() > deadline:
                return

    def _look_for_failure(self) -> None:
        text = self._store.peek(self._key("verdict"))
        if text is not None and text != "{}":
            self._failure = from_wire(json.loads(text)["error"])

    def _raise_verdict(self, text: str) -> None:
        verdict = json.loads(text)
        if "error" in verdict:
            raise from_wire(verdict["error"])

    def _wait(self, key: str, vigil: Vigil) -> str:
        for _ in backoff(self.identity.world_size):
            if (text := self._store.peek(self._key(key))) is not None:
                return text
            if vigil.is_due():
                if key != "verdict":
                    self._raise_verdict(self._store.peek(self._key("verdict")) or "{}")
                vigil.look()
                # whoever waits long must be seen to have arrived
                self._pulse.beat(Progress("done" if key == "verdict" else "waiting"))
        raise AssertionError("backoff() never ends")

    def _vigil_over_everybody(self) -> Vigil:
        others = range(self.identity.world_size) if self.identity.rank == 0 else [0]
        return Vigil(
            [self._watch(rank) for rank in others if rank != self.identity.rank],
            self._settings,
            self.identity,
        )

    def _watch(self, rank: int) -> Watch:
        return Watch(self._store, self._key(f"status/{rank}"), rank, self._settings)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _run_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        with suppress(OSError):
            callback()
