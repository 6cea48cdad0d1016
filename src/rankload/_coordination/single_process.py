"""The channel of a single process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from rankload._coordination.signals import TerminationAsException
from rankload._types import Identity, Progress


class SingleProcessChannel:
    """The channel of a single process: nobody to agree with, nobody to wait for."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._termination = TerminationAsException()
        self._on_exit: list[Callable[[], None]] = []

    def agree(self, arguments: dict[str, Any]) -> None:
        """Nobody disagrees."""

    def report(self, progress: Progress) -> None:
        """Nobody listens, but for a signal that has come."""
        self._termination.check()

    def post(self, key: str, value: dict[str, Any]) -> None:
        """Nobody reads."""

    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        """Unreachable: a single process leads every domain."""
        raise AssertionError("a single process waits for nobody")

    def meet(self, key: str, *, agrees: bool = False) -> bool:
        """Nobody else is to come."""
        return agrees

    def answer(self, question: str, respond: Callable[[], dict[str, Any]]) -> None:
        """Nobody asks."""

    def ask(self, question: str, of_rank: int) -> dict[str, Any]:
        """Unreachable: a single process has only its own file."""
        raise AssertionError("a single process asks nobody")

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

    def close(self) -> None:
        """Run what was to run when the call ends; for a channel that is not used as a context manager."""
        run_all(self._on_exit)

    def __enter__(self) -> SingleProcessChannel:
        self._termination.install()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._termination.defer()
            run_all(self._on_exit)
        finally:
            self._termination.restore()


def run_all(callbacks: list[Callable[[], None]]) -> None:
    """Run each; OSErrors are ignored."""
    for callback in callbacks:
        with suppress(OSError):
            callback()
