"""`Channel`: the ranks of one call, as the rest of rankload sees them."""

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
    """The ranks of one call. A context manager: leaving it is the verdict, the same on every rank.

    All ranks enter a call in the same order. Within it, `post` and `wait_for` carry values from one rank to others.
    Every method that waits raises RankloadError when another rank has failed meanwhile; `wait_for` lists the errors.

    While the call lasts, SIGTERM raises an exception on the main thread, so that leases and partial files are released.

    Args:
        identity: who this process is among the ranks of the call.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._termination = TerminationAsException()
        self._on_exit: list[Callable[[], None]] = []

    @abstractmethod
    def agree(self, arguments: dict[str, Any]) -> None:
        """Announce this rank, and check that every rank passed the same arguments. Collective.

        Raises:
            ArgumentMismatchError: they differ; names both ranks and both values.
        """

    @abstractmethod
    def report(self, progress: Progress) -> None:
        """Publish this rank's progress (see `Report`).

        Raises:
            RankloadError: whatever made another rank fail.
        """

    @abstractmethod
    def post(self, key: str, value: dict[str, Any]) -> None:
        """Publish a JSON-able value of at most 64 KiB under a key of this call."""

    @abstractmethod
    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        """Wait for a posted value, and watch the rank that is to post it.

        Raises:
            RankLostError: that rank was killed or is frozen.
            ProgressTimeoutError: it lives but makes no progress.
            ArrivalTimeoutError: it never made the call.
            RankloadError: whatever made another rank fail meanwhile.
        """

    @abstractmethod
    def has(self, key: str) -> bool:
        """Return whether a value was posted, without waiting."""

    @abstractmethod
    def first(self, key: str, value: str) -> str:
        """Return the value that the first rank passed for a key."""

    def claim(self, key: str) -> int:
        """Return the rank that claimed the key first; this one, if nobody did before."""
        return int(self.first(key, str(self.identity.rank)))

    @abstractmethod
    def answer(self, question: str, respond: Callable[[], dict[str, Any]]) -> None:
        """Answer a question of another rank whenever this one waits for others."""

    @abstractmethod
    def ask(self, question: str, of_rank: int) -> dict[str, Any]:
        """Return a rank's answer to a question. That rank has called `answer` before; raises like `wait_for`."""

    @abstractmethod
    def meet(self, key: str, *, agrees: bool = False) -> bool:
        """Wait until every rank has come here: none goes on if one fails before. Collective.

        Returns:
            Whether all of them agree.
        """

    @abstractmethod
    def watch_over(self, ranks: Iterable[int]) -> Callable[[Progress], None]:
        """Return a function to call repeatedly during a wait of another kind, such as one on a socket.

        It publishes this rank's progress, and raises when another rank has failed or one of the given ones is lost.
        """

    @property
    @abstractmethod
    def store_host(self) -> str | None:
        """Host of the job's store, which every rank can reach; None where it is not known."""

    @abstractmethod
    def remember(self, fact: str, value: str | None = None) -> str | None:
        """Keep a fact for later calls of the same ranks, or recall it (None when it is not known).

        A call that fails leaves nothing on any rank.
        """

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Run a callback when the call ends on this rank, after the verdict; OSErrors are ignored."""
        self._on_exit.append(callback)

    def close(self) -> None:
        """Run the callbacks of `on_exit`; for a channel that is not used as a context manager."""
        for callback in self._on_exit:
            with suppress(OSError):
                callback()

    @abstractmethod
    def __enter__(self) -> Self:
        """Begin the call."""

    @abstractmethod
    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the call; raise what another rank failed with first, if this one did not fail."""
