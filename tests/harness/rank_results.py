"""How ranks end, and the words for it."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class RankError:
    """What a rank's function raised, as far as it can be told in another process."""

    type_name: str
    message: str
    traceback: str
    pickled: bytes | None = field(repr=False)

    @property
    def original(self) -> BaseException:
        """The exception itself, after a trip through pickle."""
        assert self.pickled is not None, f"{self.type_name} does not survive pickling"
        error: BaseException = pickle.loads(self.pickled)
        return error


@dataclass(frozen=True)
class RankResult:
    """How one rank ended.

    Attributes:
        exitcode: As of ``subprocess``: negative is the signal that killed it.
        seconds: What the function took; of a rank that died in it, its whole life.
        ended_at: ``time.monotonic()`` of its death, comparable with the test's own clock.
        peak_rss_bytes: The kernel's high-water mark; torch's own pages included.
        marks: What it told by ``rank.mark``.
    """

    rank: int
    pid: int
    exitcode: int
    exception: RankError | None
    stdout: str
    stderr: str
    seconds: float
    started_at: float
    ended_at: float
    peak_rss_bytes: int
    marks: Mapping[str, Any]
    pickled_value: bytes | None = field(repr=False)

    @property
    def value(self) -> Any:
        """What the function returned. Raises RankFailed, with the rank's traceback, if it did not."""
        if self.pickled_value is None:
            raise RankFailed(self.describe())
        return pickle.loads(self.pickled_value)

    @property
    def outcome(self) -> str:
        if self.pickled_value is not None:
            # It still has to leave: a thread may hang, an exit handler may fail.
            return "returned" if self.exitcode == 0 else f"returned, then ended with {_exit_words(self.exitcode)}"
        if self.exception is not None:
            return f"raised {self.exception.type_name}: {self.exception.message}"
        return f"ended with {_exit_words(self.exitcode)}"

    def describe(self) -> str:
        trace = self.exception.traceback if self.exception else ""
        return f"rank {self.rank} {self.outcome}\n{indented(trace)}{streams_text(self.stdout, self.stderr)}"


class RankFailed(AssertionError):
    """A rank did not do what the test took for granted."""


class RanksTimedOut(AssertionError):
    """Some ranks had not ended at the deadline. All are dead now; the message says what each was doing."""

    def __init__(self, message: str, hung_ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.hung_ranks = list(hung_ranks)


def _exit_words(exitcode: int) -> str:
    return f"exit code {exitcode}" if exitcode >= 0 else signal.Signals(-exitcode).name


def indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def streams_text(stdout: str, stderr: str) -> str:
    return "".join(
        f"  {name}:\n{indented(indented(text[-_TAIL_CHARACTERS:]))}"
        for name, text in (("stdout", stdout), ("stderr", stderr))
        if text
    )
