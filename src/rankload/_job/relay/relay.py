"""Passing bytes on as they come: a byte is on its way to the next rank before the next one has arrived."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from rankload._errors import LoadError, ProgressTimeoutError, RankLostError
from rankload._job.awake import AwakeTime
from rankload._job.relay.links import Link
from rankload._types import Phase, Progress

#: As much as goes through a socket at a time: what was just received is in the cache when it is sent on.
_MOST_BYTES = 256 << 10

#: Between two looks at the other ranks.
_LOOK_SECONDS = 0.2

#: How long a broken connection waits for word from the rank that broke it: whoever fails tells why before it leaves.
_WORD_SECONDS = 2.0

#: The most that one wait may count towards a deadline; more means that this process was stopped.
_LONGEST_WAIT_SECONDS = 6.0

#: Looks after the other ranks: raises what one has failed with, or that one is lost. Gets this rank's progress.
Watch = Callable[[Progress], None]


class Block(Protocol):
    """The next bytes of the stream."""

    def __len__(self) -> int:
        """Return how many they are."""

    def send(self, link: Link, begin: int, end: int) -> int:
        """Send some of those from begin to end; return how many."""


class BytesBlock:
    """Bytes in memory: to be sent, or to be filled."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory.cast("B")

    def __len__(self) -> int:
        """See `Block`."""
        return len(self.memory)

    def send(self, link: Link, begin: int, end: int) -> int:
        """See `Block`."""
        return link.socket.send(self.memory[begin : min(end, begin + _MOST_BYTES)])


class FileBlock:
    """Bytes of an open file, which go from the page cache into the socket without a copy: sendfile(2)."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length

    def __len__(self) -> int:
        """See `Block`."""
        return self._length

    def send(self, link: Link, begin: int, end: int) -> int:
        """See `Block`."""
        offset, length = self._offset + begin, end - begin
        try:
            sent = os.sendfile(link.socket.fileno(), self._descriptor, offset, length)
        except (BlockingIOError, ConnectionError, TimeoutError):
            raise
        except OSError:  # a filesystem that cannot, or one that cannot read: the read says which
            sent = link.socket.send(self._read(min(length, _MOST_BYTES), offset))
        if not sent:
            raise LoadError("the file has become shorter while it was sent: who has cut it off?")
        return sent

    def _read(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise LoadError(f"cannot read the file that is to be sent: {error.strerror}", errno=error.errno) from error


class Relay:
    """This rank's place in the chain.

    Every rank of the chain passes on the same blocks, by their lengths, in the same order.

    Args:
        upstream: where the bytes come from; None at the source.
        downstreams: where they go to.
        watch: called a few times a second.
        progress_seconds: the longest time without a byte.
    """

    def __init__(
        self, upstream: Link | None, downstreams: Sequence[Link], watch: Watch, progress_seconds: float
    ) -> None:
        self.upstream, self.downstreams = upstream, downstreams
        self._watch, self._progress_seconds = watch, progress_seconds
        self._looked_at, self._still = time.monotonic(), AwakeTime(_LONGEST_WAIT_SECONDS)
        self.bytes_passed = 0
        self.bytes_total: int | None = None

    def send(self, block: Block) -> None:
        """Send a block to all downstream ranks. At the source."""
        assert self.upstream is None
        self._pass_on(block, None, len(block))

    def receive(self, memory: memoryview) -> None:
        """Fill memory from upstream; return when all downstream ranks have been sent it, too."""
        block = BytesBlock(memory)
        self._pass_on(block, block.memory, 0)

    def _pass_on(self, block: Block, memory: memoryview | None, ready: int) -> None:
        """Move a block along.

        Args:
            block: it.
            memory: where to receive it.
            ready: how many of its bytes are there already.
        """
        length, sent = len(block), [0] * len(self.downstreams)
        while ready < length or min(sent, default=length) < length:
            received = 0
            if memory is not None and ready < length:
                received = self._receive(memory[ready : ready + _MOST_BYTES])
                ready += received
            moved = received
            for number, link in enumerate(self.downstreams):
                if sent[number] < ready:
                    count = self._send(block, link, sent[number], ready)
                    sent[number], moved = sent[number] + count, moved + count
            if moved:
                self._note(received if memory is not None else moved // len(self.downstreams))
            else:
                self._wait(
                    wants_more=ready < length,
                    links=[link for link, count in zip(self.downstreams, sent, strict=True) if count < ready],
                )

    def _receive(self, memory: memoryview) -> int:
        assert self.upstream is not None
        try:
            count = self.upstream.socket.recv_into(memory)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(self.upstream, error) from error
        if not count:
            raise self._lost(self.upstream, None)
        return count

    def _send(self, block: Block, link: Link, begin: int, end: int) -> int:
        try:
            return block.send(link, begin, end)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(link, error) from error

    def _wait(self, *, wants_more: bool, links: Sequence[Link]) -> None:
        poll = select.poll()
        if wants_more and self.upstream is not None:
            poll.register(self.upstream.socket, select.POLLIN)
        for link in links:
            poll.register(link.socket, select.POLLOUT)
        self._still.skip()  # the time that this rank has spent on something else
        if poll.poll(_LOOK_SECONDS * 1000):
            return
        self._look()
        self._still.count()
        if self._still.seconds >= self._progress_seconds:
            waited_for = self.upstream if wants_more and self.upstream is not None else links[0]
            raise ProgressTimeoutError(
                f"no byte went from or to rank {waited_for.rank} on {waited_for.host} for {self._still.seconds:.0f} s: "
                "a hung network; raise timeout= if this is normal here",
                stuck_rank=waited_for.rank,
                stuck_host=waited_for.host,
            )

    def _note(self, count: int) -> None:
        self.bytes_passed += count
        self._still.restart()
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._look()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        phase: Phase = "sending" if self.upstream is None else "receiving"
        self._watch(Progress(phase, self.bytes_passed, self.bytes_total))

    def _lost(self, link: Link, error: OSError | None) -> RankLostError:
        """Return the error for a broken connection, unless the other rank has said why it left: raise that."""
        deadline = time.monotonic() + _WORD_SECONDS
        while time.monotonic() < deadline:
            self._look()
            with suppress(InterruptedError):
                time.sleep(0.05)
        why = "closed" if error is None else error.strerror or str(error)
        return RankLostError(
            f"the connection to rank {link.rank} on {link.host} broke ({why}): it was killed, or its node or the "
            "network failed",
            lost_rank=link.rank,
            lost_host=link.host,
        )
