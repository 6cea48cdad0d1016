"""The channel of a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from typing_extensions import Self, override

from rankload._coordination.channel import Channel
from rankload._types import Progress


class SingleProcessChannel(Channel):
    """The channel of a single process: there are no other ranks to agree with, to inform or to wait for."""

    @override
    def agree(self, arguments: dict[str, Any]) -> None:
        pass

    @override
    def report(self, progress: Progress) -> None:
        self._termination.check()

    @override
    def post(self, key: str, value: dict[str, Any]) -> None:
        pass

    @override
    def wait_for(self, key: str, from_rank: int) -> dict[str, Any]:
        raise AssertionError("a single process waits for nobody")

    @override
    def has(self, key: str) -> bool:
        return False

    @override
    def first(self, key: str, value: str) -> str:
        return value

    @override
    def count(self, key: str, ranks: int = 1) -> int:
        return 1

    @override
    def answer(self, question: str, respond: Callable[[], dict[str, Any]]) -> None:
        pass

    @override
    def ask(self, question: str, of_rank: int) -> dict[str, Any]:
        raise AssertionError("a single process asks nobody")

    @override
    def meet(self, key: str) -> None:
        pass

    @override
    def contribute(self, key: str, value: str | None) -> None:
        pass

    @override
    def contributions(self, key: str) -> list[str]:
        raise AssertionError("a single process waits for nobody")

    @override
    def watch_over(self, ranks: Iterable[int]) -> Callable[[Progress], None]:
        return self.report

    @override
    def any_backs_off(self, ranks: Iterable[int]) -> bool:
        return False

    @property
    @override
    def store_host(self) -> str | None:
        return None

    @override
    def remember(self, fact: str, value: str | None = None) -> str | None:
        return None

    @override
    def __enter__(self) -> Self:
        self._termination.install()
        return self

    @override
    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._termination.defer()
            self.close()
        finally:
            self._termination.restore()
