"""One call of all ranks: agreement at the start, values between ranks in the middle, one verdict at the end.

A warm call costs a rank six store operations: the agreement, the leader's message (where the file is, who shares it),
the fetched file, the rank's own success, the verdict, and ``seen``. The last is needed only if the store lives in rank
0's process. The server answers a wait when the value is there (see `AwaitedKey`). Only rank 0 polls: it counts the
ranks that are through.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from typing_extensions import Self, override

from rankload._coordination.agreement import Agreement
from rankload._coordination.awaited_key import GIVEN_UP, AwaitedKey
from rankload._coordination.channel import Channel
from rankload._coordination.heartbeat import Heartbeat, PeerMonitor, RollCall, Status
from rankload._coordination.polling import backoff, look_interval_seconds, silence_limit_seconds
from rankload._coordination.rendezvous import Session
from rankload._coordination.signals import Terminated
from rankload._coordination.verdict import Verdict, as_shared_error
from rankload._coordination.watchdog import Watchdog
from rankload._settings import Settings
from rankload._types import Progress
from rankload.errors import ArrivalTimeoutError, RankloadError, RankLostError, StoreLostError

#: How long rank 0 keeps the store open after a failed call, for ranks that have not read the verdict. If some still
#: have not, rank 0's process waits again at exit.
_FAREWELL_SECONDS = 5.0

#: The same after SIGTERM (schedulers kill soon after), and after the loss of a rank, which will never read the verdict.
#: In large jobs it is longer, since the other ranks look less often.
_HURRIED_SECONDS = 0.3

#: How often a wait also looks for a failure, except in large jobs. The first rank that finds a failure wakes those that
#: wait for the same key.
_LOOK_SECONDS = 0.05

#: Errors after which rank 0 waits for no other rank.
_GIVING_UP = (ArrivalTimeoutError, RankLostError)


class RankChannel(Channel):
    """The channel of one call of several ranks, over the job's store.

    Args:
        session: session of this rank with the others; outlasts the call.
        settings: deadlines.
    """

    def __init__(self, session: Session, settings: Settings) -> None:
        super().__init__(session.identity)
        self._session, self._settings = session, settings
        self._store, self._prefix = session.store, session.call_prefix(session.calls.made)
        self._watched = list(range(1, self.identity.world_size)) if self.identity.rank == 0 else [0]
        self._agreement = Agreement(self._store, self._key, self.identity, session.calls.made)
        self._facts: dict[str, str] = {}
        self._answers: dict[str, Callable[[], dict[str, Any]]] = {}
        self._verdict = Verdict(self._store, self._key, self.identity)
        self._failure: RankloadError | None = None
        self._awaited: list[int] = []  # ranks that this rank's own thread waits for, and watches meanwhile
        others_look_seconds = look_interval_seconds(self.identity.world_size, _LOOK_SECONDS)
        self._look_seconds = others_look_seconds if self.identity.rank else _LOOK_SECONDS
        self._hurried_seconds = max(_HURRIED_SECONDS, 1.5 * others_look_seconds)
        self._looked_at = time.monotonic()
        self._roll_call: RollCall | None = None
        self._heartbeat = Heartbeat(
            self._store,
            self._status_key(self.identity.rank),
            self.identity,
            min(settings.heartbeat_seconds, settings.progress_seconds / 4),  # rarer ones would show no progress in time
            self._look_around,
            self._note_failure,
        )
        # a rank that downloads waits for no other rank, and would otherwise be the last to notice a lost one
        self._watchdog_meanwhile = self._watchdog_over(self._watched, while_working=True)

    @override
    def agree(self, arguments: dict[str, Any]) -> None:
        if not self._agreement.enter(arguments):
            self._agreement.compare(self._wait_for("arguments", self._watched))

    @override
    def report(self, progress: Progress) -> None:
        self._raise_failure()
        self._heartbeat.beat(progress)

    @override
    def post(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(self._key(key), json.dumps(value))

    @override
    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        return self._wait_for(key, [from_rank])

    @override
    def answer(self, question: str, respond: Callable[[], dict[str, Any]]) -> None:
        self._answers[question] = respond

    @override
    def ask(self, question: str, of_rank: int) -> dict[str, Any]:
        self.post(f"asked/{question}", {})
        return self.wait_for(f"answer/{question}", from_rank=of_rank)

    @override
    def meet(self, key: str) -> None:
        if self._store.add(self._key(f"met/{key}"), 1) == self.identity.world_size:
            self.post(f"met/{key}/all", {})
        self._wait_for(f"met/{key}/all", self._watched)
        self._agreement.have_all_come = True

    @override
    def contribute(self, key: str, value: str | None) -> None:
        # one counter holds both numbers: the ranks that have come and, from the 33rd bit on, the values
        values, come = divmod(self._store.add(self._key(f"list/{key}"), 1 + ((value is not None) << 32)), 1 << 32)
        if value is not None:
            self.post(f"list/{key}/{values - 1}", {"value": value})
        if come == self.identity.world_size:
            found = [self._wait_for(f"list/{key}/{index}", self._watched)["value"] for index in range(values)]
            self.post(f"list/{key}/all", {"values": found})

    @override
    def contributions(self, key: str) -> list[str]:
        found = self._wait_for(f"list/{key}/all", self._watched)["values"]
        self._agreement.have_all_come = True
        return list(found)

    @override
    def watch_over(self, ranks: Iterable[int]) -> Callable[[Progress], None]:
        watchdog = self._watchdog_over(ranks)

        def watch(progress: Progress) -> None:
            self.report(progress)
            if watchdog.is_due():
                watchdog.look()

        return watch

    @override
    def any_backs_off(self, ranks: Iterable[int]) -> bool:
        texts = (self._store.peek(self._status_key(rank)) for rank in ranks)
        return any(Status.from_json(text).progress.phase == "backoff" for text in texts if text is not None)

    @property
    @override
    def store_host(self) -> str | None:
        return self._store.host

    @override
    def has(self, key: str) -> bool:
        return self._store.peek_requested(self._key(key)) is not None

    @override
    def first(self, key: str, value: str) -> str:
        return self._store.set_first(self._key(key), value)

    @override
    def count(self, key: str, ranks: int = 1) -> int:
        return self._store.add(self._key(key), ranks)

    @override
    def remember(self, fact: str, value: str | None = None) -> str | None:
        if value is not None:
            self._facts[fact] = value
        return self._facts.get(fact) or self._session.remembered.get(fact)

    @override
    def __enter__(self) -> Self:
        self._termination.install()
        try:
            self._heartbeat.start()
        except BaseException as error:  # no more threads, or SIGTERM
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    @override
    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._conclude(error)
        finally:
            try:
                self._termination.defer()
                self._heartbeat.stop(_HURRIED_SECONDS if self._termination.has_arrived else _FAREWELL_SECONDS)
                self.close()
            finally:
                self._termination.restore()

    def _conclude(self, error: BaseException | None) -> None:
        """Return after success on all ranks, or to let this rank's own error propagate; else raise the first cause."""
        if error is None:
            try:
                self._await_verdict()
            except BaseException as late_error:
                self._tell(late_error)
                raise
            self._session.remembered.update(self._facts)
        else:
            self._tell(error)

    def _await_verdict(self) -> None:
        """Count this rank as through, and wait until all ranks are through or one has failed."""
        self._raise_failure()
        self._wait_until(self._session.has_left_rendezvous, self._watched, Progress("done"))
        self._verdict.count_through()
        if self.identity.rank == 0:
            self._wait_until(self._may_succeed, self._watched, Progress("done"))
            self._verdict.succeed()
        else:
            with self._verdict.await_key(self._session.waiting, self._look_seconds) as awaited:
                self._wait_until(lambda: self._verdict.read(awaited), self._watched, Progress("done"), awaited.sleep)
        self._raise_failure()
        self._session.calls.note_success()
        if not self._verdict.outlast_readers(silence_limit_seconds(self._settings)) and not self._verdict.has_readers():
            raise RankLostError(
                "every rank finished its part, but no other rank has read that the call succeeded: the others were "
                "killed, or gave rank 0 up as lost while its process was stopped",
                lost_rank=self._watched[0] if len(self._watched) == 1 else None,
            )

    def _may_succeed(self) -> bool:
        """Return, on rank 0, whether every rank is through and none can have given rank 0 up.

        A rank gives rank 0 up when rank 0 was silent for the silence limit. If rank 0 stood still for half of that
        limit, it waits for a new heartbeat of every rank. A rank that has left the call sends none, and counts as lost
        in due time.
        """
        if not self._verdict.are_all_through():
            return False
        if self._heartbeat.take_longest_still_seconds() > silence_limit_seconds(self._settings) / 2:
            self._roll_call = RollCall(self._store, map(self._status_key, self._watched))
        return self._roll_call is None or self._roll_call.is_complete()

    def _answer_questions(self) -> None:
        for question in [question for question in self._answers if self.has(f"asked/{question}")]:
            self._awaited = []  # an answer may take long
            self.post(f"answer/{question}", self._answers.pop(question)())

    def _tell(self, error: BaseException) -> None:
        """Publish why this rank fails. If another rank failed first, raise that rank's error."""
        if isinstance(error, _GIVING_UP):
            self._session.give_up_absent_ranks()
        is_hurried = isinstance(error, (*_GIVING_UP, Terminated))
        patience_seconds = self._hurried_seconds if is_hurried else _FAREWELL_SECONDS
        if isinstance(error, Terminated):
            self._verdict.hurry(patience_seconds)
        has_lost_store = isinstance(error, StoreLostError) and error.rank is None  # not another rank's StoreLostError
        mine = as_shared_error(error, self.identity)
        self._session.calls.note_failure(mine)
        with suppress(StoreLostError):  # no rank can be told any more; this rank's own error is more useful
            if not has_lost_store:
                self._verdict.fail(mine)
            if not self._verdict.outlast_readers(patience_seconds) and not isinstance(mine, _GIVING_UP):
                self._session.calls.wait_at_exit(self._verdict.outlast_readers, self._settings.liveness_seconds)
        first = self._verdict.failure
        if first is not None:
            self._session.calls.note_failure(first)
        is_told = self._verdict.is_known and not has_lost_store
        self._session.is_over = not is_told or self._session.is_ended_by(first or mine)
        if isinstance(error, Exception) and error is not first:
            if first is None or (first.rank, first.host, type(first)) == (mine.rank, mine.host, type(mine)):
                first = mine
            if error is not first:
                raise first from error

    def _look_around(self) -> None:
        """Look for the verdict, and at the ranks that this rank watches. Runs on the heartbeat thread."""
        self._agreement.support()
        if not self._awaited:
            self._verdict.look()
        self._session.raise_joining_failure()
        if self._awaited != self._watched and self._watchdog_meanwhile.is_due():
            self._watchdog_meanwhile.look()

    def _note_failure(self, error: RankloadError) -> None:
        self._failure = error

    def _raise_failure(self) -> None:
        self._termination.check()
        # once there is a verdict, a failure that the heartbeat thread noted no longer counts: the other ranks may have
        # gone on, and left the call
        if failure := self._verdict.failure if self._verdict.is_known else self._failure:
            raise failure

    def _wait_for(self, key: str, ranks: Iterable[int]) -> dict[str, Any]:
        with AwaitedKey(self._store, self._session.waiting, self._key(key), self._look_seconds) as awaited:
            self._wait_until(awaited.is_there, ranks, Progress("waiting"), awaited.sleep)
        assert awaited.text is not None
        if awaited.text == GIVEN_UP:  # the rank that gave up publishes why
            self._wait_until(self._verdict.look, ranks, Progress("waiting"))
            self._raise_failure()
        return json.loads(awaited.text)  # type: ignore[no-any-return]

    def _wait_until(
        self,
        is_there: Callable[[], bool],
        ranks: Iterable[int],
        progress: Progress,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Check until ``is_there`` returns True, and watch the ranks that are to bring that about."""
        watchdog = self._watchdog_over(ranks)
        self._awaited = list(ranks)
        for _ in backoff(self.identity.world_size if self.identity.rank else 1, sleep):  # rank 0's keys are its own
            if is_there():
                break
            if time.monotonic() - self._looked_at >= self._look_seconds:
                self._looked_at = time.monotonic()
                self._verdict.look()
                self._answer_questions()
            self._raise_failure()
            if watchdog.is_due():
                watchdog.look()
                self._heartbeat.beat(progress)
        self._awaited = []

    def _watchdog_over(self, ranks: Iterable[int], *, while_working: bool = False) -> Watchdog:
        watches = [
            PeerMonitor(
                self._store, self._status_key(rank), rank, self._settings, self._has_come, self._session.process_of
            )
            for rank in ranks
        ]
        return Watchdog(watches, self._settings, self.identity, while_working=while_working)

    def _has_come(self, rank: int) -> bool:
        return self._agreement.look() or self._session.has_begun(rank)

    def _status_key(self, rank: int) -> str:
        return self._key(f"status/{rank}")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"
