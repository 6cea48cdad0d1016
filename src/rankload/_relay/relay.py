"""Forward bytes as they arrive: a byte goes on before the next one has come.

After each piece of a block comes the source's tag (see `seal`). A rank passes a tag on only if it fits, so the first
rank after a fault is the one that reports it; and it returns no block of which a piece has not been verified.
"""

from __future__ import annotations

import hmac
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from rankload._platform.clock import SuspendAwareTimer
from rankload._relay.blocks import Block
from rankload._relay.links import Link
from rankload._relay.running_digest import BackgroundDigest
from rankload._relay.seal import TAG_BYTES, Seal, pieces
from rankload._types import Phase, Progress
from rankload.errors import CoordinationError, ProgressTimeoutError, RankLostError

#: As much as goes through a socket at a time: what was just received is in the cache when it is sent on.
_MAX_BYTES = 256 << 10

#: Between two looks at the other ranks.
_LOOK_SECONDS = 0.2

#: How long a broken connection waits for word from the rank that broke it: whoever fails tells why before it leaves.
_WORD_SECONDS = 2.0

#: The most that one wait may count towards a deadline; more means that this process was stopped.
_MAX_WAIT_SECONDS = 6.0

#: Looks after the other ranks: raises what one has failed with, or that one is lost. Gets this rank's progress.
Watch = Callable[[Progress], None]


class Relay:
    """This rank's place in the chain.

    Every rank of the chain passes on the same blocks, by their lengths, in the same order.

    Args:
        upstream: where the bytes come from; None at the source.
        downstreams: where they go to.
        watch: called a few times a second.
        progress_seconds: the longest time without a byte.
        key: authenticates the stream; the same on all ranks of the chain, and known to nobody else.
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

    def send(self, block: Block) -> None:
        """Send a block to all downstream ranks. At the source."""
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
        """Fill memory from upstream; return when all downstream ranks have been sent it, too.

        Returns:
            The SHA-256 of the block, in hex.

        Raises:
            CoordinationError: what came is not what the source sent. The memory is not to be used.
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
        """Move some bytes along.

        Args:
            memory: where they are, or where to receive them.
            links: where to send them.
            ready: how many of them are there already.
            hear: gets those that are received, in order.
            is_counted: whether they count as bytes of the stream.
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

    def _tampered(self) -> CoordinationError:
        link = self.upstream
        assert link is not None
        return CoordinationError(
            f"what came from rank {link.rank} on {link.host} is not what the source has sent, somewhere before byte "
            f"{self.bytes_passed} of the stream: something between the nodes changes the bytes; nothing is loaded "
            "from them; check the network, choose another one by GLOO_SOCKET_IFNAME, or pass delivery='read'",
            upstream_rank=link.rank,
            upstream_host=link.host,
        )

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
