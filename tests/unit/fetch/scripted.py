"""An origin, a target and a transfer without sockets and disks: what each request gets is a function of the test's."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankload._cache.layout import Entry
from rankload._fetch.origins.origin import Version
from rankload._fetch.partials.partial import Partial
from rankload._fetch.transfer.engine import TransferRunner
from rankload._fetch.transfer.hasher import OrderedHasher
from rankload._fetch.transfer.retry import Retries
from rankload._fetch.transfer.scaling import StreamScaler
from rankload._fetch.transfer.state import TransferState
from rankload._settings import Settings
from rankload._urls import Url
from rankload.errors import NetworkError

PIECE_BYTES = 1000

URL = Url.parse("http://origin.example/file")

SETTINGS = Settings(chunk_bytes=4000, streams=4, retries=3, backoff_seconds=0.001)

#: Every request is for a range of its own, the first one, too.
RANGES_FIRST = replace(SETTINGS, whole_first=False)


@dataclass
class ScriptedBody:
    """Gives its bytes in pieces; ``before_read`` is called with the offset before each and may wait or raise."""

    content: bytes
    version: Version
    begin: int
    end: int
    is_whole: bool = False
    before_read: Callable[[int], None] = lambda offset: None

    def __post_init__(self) -> None:
        self._position = self.begin

    def read(self) -> bytes:
        self.before_read(self._position)
        piece = self.content[self._position : min(self._position + PIECE_BYTES, self.end)]
        self._position += len(piece)
        return piece

    def break_off(self) -> None:
        """Cannot, as of fsspec's filesystems."""


@dataclass
class ScriptedOrigin:
    """Answers as ``answer(begin, end)`` says: None is the range as asked, a string the failure of that name."""

    content: bytes
    before_read: Callable[[int], None] = lambda offset: None
    answer: Callable[[int, int | None], Exception | None] = lambda begin, end: None
    url: Url = URL
    display_name: str = URL.display_name
    etag: str = '"1"'
    may_answer_once: bool = True
    requests: list[tuple[int, int | None]] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self, begin: int, end: int | None, version: Version | None) -> Iterator[ScriptedBody]:
        self.requests.append((begin, end))
        error = self.answer(begin, end)
        if error is not None:
            raise error
        found = Version(len(self.content), self.etag)
        if end is None:
            yield ScriptedBody(self.content, found, 0, len(self.content), True, self.before_read)
        else:
            yield ScriptedBody(self.content, found, begin, min(end, len(self.content)), False, self.before_read)

    def close(self) -> None:
        pass


def broken(text: str = "broken") -> NetworkError:
    return NetworkError(text, url="http://origin.example/file")


def content_of(size_bytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(size_bytes)


def new_partial(tmp_path: Path, settings: Settings = SETTINGS) -> Partial:
    return Partial(Entry(tmp_path / "file"), settings)


def new_work(
    origin: Any, target: Any, hasher: OrderedHasher, settings: Settings = SETTINGS, **arguments: Any
) -> TransferState:
    defaults = {"known": None, "is_whole": False, "has_digest": False, "retries": Retries(settings)}
    return TransferState(origin, target, hasher, settings=settings, **(defaults | arguments))


def run(
    state: TransferState, report: Callable[[Any], None] = lambda progress: None, streams: int | None = None
) -> None:
    """Runs a transfer; ``streams``: as if its pace had found out already that so many are best."""
    transfer = TransferRunner(state, report, lambda done, total: None, 1)
    if streams is not None:
        transfer._scaler = _KnownPace(streams)
    transfer.run()


class _KnownPace(StreamScaler):
    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.target = target

    def observe(self, now: float, done_bytes: int, active: int, hash_bytes_per_second: float = math.inf) -> None:
        pass


def content_in(partial: Partial) -> bytes:
    return os.pread(partial.descriptor, 1 << 30, 0)


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]
