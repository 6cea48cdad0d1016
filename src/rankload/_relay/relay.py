"""Forward bytes to the downstream ranks as they arrive.

The source's tag follows each piece of a block (see `seal`). A rank forwards only tags that it has verified, so the
first rank after a fault reports the fault. A rank returns a block only after it has verified all pieces.
"""

from __future__ import annotations

import hmac
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rankload._platform.clock import SuspendAwareTimer
from rankload._relay.blocks import Block
from rankload._relay.links import WORD_SECONDS, Link
from rankload._relay.running_digest import BackgroundDigest
from rankload._relay.seal import TAG_BYTES, Seal, pieces
from rankload._types import Phase, Progress
from rankload.errors import CoordinationError, ProgressTimeoutError, RankLostError

#: Most bytes in one socket call: received bytes are still in the CPU cache when they are sent on.
_MAX_BYTES = 256 << 10

#: Interval between two checks on the other ranks.
_LOOK_SECONDS = 0.2

#: The most that one wait may count towards a deadline; a longer wait means that this process was stopped.
_MAX_WAIT_SECONDS = 6.0

#: Check on the other ranks, given this rank's progress. Raises another rank's error, or RankLostError.
Watch = Callable[[Progress], None]


class Relay:
    """This rank's place in the chain.

    Every rank of the chain transfers blocks of the same lengths in the same order.

    Args:
        upstream: link to the rank that sends the bytes; None at the source.
        downstreams: links to the ranks that get the bytes next.
        watch: called a few times a second.
        progress_seconds: longest time without a byte.
        key: key that authenticates the stream; all ranks of the chain share it, and nobody else knows it.

    Attributes:
        bytes_passed: bytes of the stream that this rank has sent or received; tags are not counted.
        bytes_total: expected length of the stream in bytes; None if unknown.
    """

    def __init__(
        self, upstream: Link | None, downstreams: Sequence[Link], watch: Watch, progress_seconds: float, key: bytes
    ) -> None:
        self.upstream, self.downstreams = upstream, downstreams
        self._seal = Seal(key)
        self._watch, self._progress_seconds = watch, progress_seconds
        self._looked_at, self._still = time.monotonic(), SuspendAwareTimer(_MAX_WAIT_SECONDS)
        self.bytes_passed = 0
        self.bytes_total: int | None = None
        self._first_at = self._last_at = 0.0

    @property
    def seconds(self) -> float:
        """Time from the first byte of the stream to the last so far."""
        return self._last_at - self._first_at

    def send(self, block: Block) -> None:
        """Send a block to all downstream ranks. Only the source may call this."""
        assert self.upstream is None
        if not self.downstreams:
            return
        with BackgroundDigest() as digest:
            for begin, end in pieces(len(block)):
                piece = block.read(begin, end)
                digest.update(piece)
                self._pass_on(piece, self.downstreams, len(piece))
                self._pass_on_tag(self._seal.next_tag(len(block), end, digest.digest()))

    def receive(self, memory: memoryview) -> str:
        """Fill memory with a block from upstream. Return after the block was sent to all downstream ranks, too.

        Returns:
            The SHA-256 of the block, in hex.

        Raises:
            CoordinationError: the bytes differ from the source's. The memory must not be used.
        """
        memory = memory.cast("B")
        with BackgroundDigest() as digest:
            for begin, end in pieces(len(memory)):
                self._pass_on(memory[begin:end], self.downstreams, 0, digest.update)
                self._pass_on(memoryview(tag := bytearray(TAG_BYTES)), (), 0, is_counted=False)
                if not hmac.compare_digest(tag, self._seal.next_tag(len(memory), end, digest.digest())):
                    raise self._tampered()
                self._pass_on_tag(tag)
            return digest.digest().hex()

    def _pass_on_tag(self, tag: bytes | bytearray) -> None:
        self._pass_on(memoryview(tag), self.downstreams, len(tag), is_counted=False)

    def _pass_on(
        self,
        memory: memoryview,
        links: Sequence[Link],
        ready: int,
        hear: Callable[[memoryview], None] = lambda _: None,
        *,
        is_counted: bool = True,
    ) -> None:
        """Receive the rest of some bytes, and send all of them on.

        Args:
            memory: the bytes, or the place to receive them.
            links: links to send the bytes to.
            ready: number of bytes that are in ``memory`` already.
            hear: called with received bytes, in order.
            is_counted: whether the bytes count as bytes of the stream.
        """
        length, sent = len(memory), [0] * len(links)
        while ready < length or min(sent, default=length) < length:
            received = 0
            if ready < length:
                received = self._receive(memory[ready : ready + _MAX_BYTES])
                hear(memory[ready : ready + received])
                ready += received
            moved = received
            for number, link in enumerate(links):
                if sent[number] < ready:
                    count = self._send(link, memory[sent[number] : min(ready, sent[number] + _MAX_BYTES)])
                    sent[number], moved = sent[number] + count, moved + count
            if moved:
                count = moved // len(links) if self.upstream is None else received
                self._note(count if is_counted else 0)
            else:
                self._wait(
                    wants_more=ready < length,
                    links=[link for link, count in zip(links, sent, strict=True) if count < ready],
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

    def _send(self, link: Link, memory: memoryview) -> int:
        try:
            return link.socket.send(memory)
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
        self._still.skip()  # this rank may have spent the time since the last count on other work
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
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        if self._last_at - self._looked_at >= _LOOK_SECONDS:
            self._look()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        phase: Phase = "sending" if self.upstream is None else "receiving"
        self._watch(Progress(phase, self.bytes_passed, self.bytes_total))

    def _tampered(self) -> CoordinationError:
        link = self.upstream
        assert link is not None
        return CoordinationError(
            f"the bytes from rank {link.rank} on {link.host} differ from those that the source sent, before byte "
            f"{self.bytes_passed} of the stream: something between the nodes changes them; nothing was loaded from "
            "them; check the network, choose another one by GLOO_SOCKET_IFNAME, or pass delivery='read'",
            upstream_rank=link.rank,
            upstream_host=link.host,
        )

    def _lost(self, link: Link, error: OSError | None) -> RankLostError:
        """Return the error for a broken connection. If the other rank reports its own error in time, raise that."""
        deadline = time.monotonic() + WORD_SECONDS
        while time.monotonic() < deadline:
            self._look()
            with suppress(InterruptedError):
                time.sleep(0.05)
        return link.broken(error)
