"""`Channel`: the interface through which one call talks to the other ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from typing_extensions import Self

from rankload._coordination.signals import TerminationAsException
from rankload._types import Identity, Progress


class Channel(ABC):
    """The ranks of one call. A context manager: its exit waits for the verdict, which is the same on every rank.

    All ranks make their calls in the same order. Within a call, `post` and `wait_for` carry values from one rank to
    others. Every method that waits raises a RankloadError if another rank fails meanwhile; `wait_for` lists the errors.

    During the call, SIGTERM raises an exception on the main thread, so that leases and partial files are released.

    Args:
        identity: identity of this process among the ranks of the call.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._termination = TerminationAsException()
        self._on_exit: list[Callable[[], None]] = []

    @abstractmethod
    def agree(self, arguments: dict[str, Any]) -> None:
        """Announce this rank, and check that every rank passed the same arguments. Collective.

        Raises:
            ArgumentMismatchError: the arguments differ; the message names two ranks and both values.
        """

    @abstractmethod
    def report(self, progress: Progress) -> None:
        """Publish this rank's progress (see `Report`).

        Raises:
            RankloadError: another rank failed; that rank's error.
        """

    @abstractmethod
    def post(self, key: str, value: dict[str, Any]) -> None:
        """Publish a JSON-able value of at most 64 KiB under a key of this call."""

    @abstractmethod
    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        """Wait for a value that ``from_rank`` posts, and watch that rank meanwhile.

        Raises:
            RankLostError: that rank was killed or is frozen.
            ProgressTimeoutError: that rank is alive but makes no progress.
            ArrivalTimeoutError: that rank did not make the call in time.
            RankloadError: another rank failed meanwhile; that rank's error.
        """

    @abstractmethod
    def has(self, key: str) -> bool:
        """Return whether a value was posted under a key, without waiting."""

    @abstractmethod
    def first(self, key: str, value: str) -> str:
        """Pass a value for a key; return the value of the rank that passed one first."""

    def claim(self, key: str) -> int:
        """Claim a key for this rank; return the rank that claimed it first."""
        return int(self.first(key, str(self.identity.rank)))

    @abstractmethod
    def count(self, key: str, ranks: int = 1) -> int:
        """Count this rank, or with 0 none, under a key; return how many have been counted, without waiting."""

    @abstractmethod
    def answer(self, question: str, respond: Callable[[], dict[str, Any]]) -> None:
        """Answer another rank's question while this rank waits for others.

        Args:
            question: name of the question.
            respond: returns the answer, a JSON-able value.
        """

    @abstractmethod
    def ask(self, question: str, of_rank: int) -> dict[str, Any]:
        """Ask a rank a question, and wait for the answer. Raises like `wait_for`.

        The other rank must call `answer` with the same question.
        """

    @abstractmethod
    def meet(self, key: str) -> None:
        """Wait until every rank has reached this point. If one fails before, none goes on. Collective."""

    @abstractmethod
    def contribute(self, key: str, value: str | None) -> None:
        """Add a value to a list, or with None just take part. Collective over all ranks; never waits."""

    @abstractmethod
    def contributions(self, key: str) -> list[str]:
        """Wait until every rank has taken part in a list; return its values, in the same order on all ranks."""

    @abstractmethod
    def watch_over(self, ranks: Iterable[int]) -> Callable[[Progress], None]:
        """Return a function to call repeatedly during another kind of wait, such as one on a socket.

        The function publishes this rank's progress. It raises if another rank failed, or if one of ``ranks`` is lost.
        """

    @abstractmethod
    def any_backs_off(self, ranks: Iterable[int]) -> bool:
        """Return whether one of the ranks waits because its origin asked for that, or before a retry."""

    @property
    @abstractmethod
    def store_host(self) -> str | None:
        """Host of the job's store, which every rank can reach; None if unknown."""

    @abstractmethod
    def remember(self, fact: str, value: str | None = None) -> str | None:
        """Remember a value for later calls of the same ranks, and return it. Without a value, return the known one.

        A failed call remembers nothing on any rank.

        Args:
            fact: name of the value.
            value: value to remember; None to look it up.
        """

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Register a callback for the end of the call on this rank, after the verdict. Its OSErrors are ignored."""
        self._on_exit.append(callback)

    def close(self) -> None:
        """Run the callbacks of `on_exit`. Call this only on a channel that is not used as a context manager."""
        for callback in self._on_exit:
            with suppress(OSError):
                callback()

    @abstractmethod
    def __enter__(self) -> Self:
        """Begin the call."""

    @abstractmethod
    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the call. If another rank failed first, raise that rank's error."""
