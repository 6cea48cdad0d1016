"""A node's place in the ring: one thread that receives units from the node before, one that sends to the next.

Which units a node sends is not planned: all that it has, from wherever, and that the next node neither has nor fetches.
A node that fetches more than its part tells the node before.

No byte is written twice, neither by the ring and a stream nor by the ring over bytes of an earlier download: the second
write could bring other bytes than those that were hashed.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rankload._fetch.exchange.catch_up import CatchUp
from rankload._fetch.exchange.frames import (
    END,
    HAVE_BYTES,
    HEAD_BYTES,
    TAG_BYTES,
    check_tag,
    have,
    head_of,
    read_haves,
    read_head,
    tag_of,
)
from rankload._fetch.exchange.plan import ExchangePlan
from rankload._fetch.exchange.wire import LOOK_SECONDS, StoppedError, Wire
from rankload._fetch.origins.origin import Version
from rankload._fetch.partials.partial import Partial
from rankload._fetch.partials.writer import PartialWriter
from rankload._fetch.transfer.state import TransferState
from rankload._platform.clock import NoProgressTimer
from rankload._relay.links import Link
from rankload._types import Progress, Report
from rankload.errors import CacheError, CoordinationError, ProgressTimeoutError

#: How often the sender looks whether another unit has come from the origin, if it has nothing to send.
_POLL_SECONDS = 0.005

#: How many of the units that the origin is to send next are looked at: streams bring several at the same time.
_LOOK_AHEAD = 64

#: Longest time that one wait may count towards a deadline. A longer one means that this process was stopped.
_MAX_WAIT_SECONDS = 6.0

#: Time for a thread to end after the exchange has.
_JOIN_SECONDS = 1.0


class Ring:
    """Exchanges units with the neighbours while a transfer fetches this node's own.

    Args:
        plan: which node fetches what.
        member: index of this node.
        version: version of the file, the same on all nodes.
        held: units that this node has.
        held_after: units that the next node has.
        links: connections from the node before, and to the next.
        key: key that authenticates units; all nodes of the job share it, and nobody else knows it.
        may_catch_up: whether to fetch more than this node's part from the origin where the ring is slower.

    Attributes:
        plan: which node fetches what.
        version: version of the file.
        own_units: units that this node is to fetch from the origin.
        received_bytes: bytes of units that came from the ring.
        extra_bytes: bytes of units that are fetched from the origin in addition.
    """

    def __init__(
        self, plan: ExchangePlan, member: int, version: Version, held: frozenset[int], held_after: frozenset[int],
        links: tuple[Link, Link], key: bytes, *, may_catch_up: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self.version, self._member, self._key = plan, version, member, key
        self.own_units = [unit for unit in plan.fetched_by(member) if unit not in held]
        self._foreign = set(plan.units).difference(held, self.own_units)  # what the ring is to bring, and has not
        self._choosing = threading.Lock()  # a unit leaves that set once: for the ring, or for a stream
        self.received_bytes = self.extra_bytes = 0
        self._is_stopped = threading.Event()
        self._upstream, self._downstream = (Wire(link, self._is_stopped) for link in links)
        self._wanted = set(plan.units).difference(held_after, plan.fetched_by(plan.next(member)))  # by the next node
        self._ready: deque[tuple[int, bytes | None]] = deque((unit, None) for unit in sorted(held))  # with their tags
        self._own = self.own_units  # those that the origin is to send, now or later
        self._awaited = deque(self.own_units)  # those of them that the sender has to look for
        self._untold: deque[int] = deque()  # those of them of which the node before does not know
        self._may_catch_up = may_catch_up
        self._catch_up: CatchUp | None = None
        self._sent_bytes = 0
        self._threads: list[threading.Thread] = []
        self._failure: Exception | None = None

    @property
    def foreign_spans(self) -> list[tuple[int, int]]:
        """Ranges of bytes that the ring is to bring."""
        return [self.plan.span(unit) for unit in self._foreign]

    @property
    def is_fetched(self) -> bool:
        """Whether any node fetches a part from the origin."""
        return bool(self.plan.missing)

    def awaited_link(self, state: TransferState) -> Link | None:
        """Return the node before if nothing but its units is missing; None if this node's own part is, too."""
        return self._upstream.link if all(state.has(*self.plan.span(unit)) for unit in self._own) else None

    def start(self, state: TransferState, partial: Partial) -> None:
        """Leave to the other nodes what they bring, and begin to receive and to send."""
        state.leave_to_others(self.version, self.foreign_spans)
        if self._may_catch_up:
            self._catch_up = CatchUp(time.monotonic(), self.plan.size_bytes - state.done_bytes, self.plan.unit_bytes)
        writer = partial.writer()
        self._run("receive", lambda: self._receive_units(state, writer), state)
        self._run("send", lambda: self._send_units(state, partial), state)

    def start_serving(self, file: Served) -> None:
        """Begin to send a file that this node has as a whole."""
        self._run("receive", self._ignore_units, file)
        self._run("send", lambda: self._send_units(file, file), file)

    def catch_up(self, state: TransferState) -> None:
        """Let the transfer fetch more if the ring is late. Called repeatedly by the thread that runs the transfer."""
        if self._catch_up is None:
            return
        self._own = [unit for unit in self._own if not state.has(*self.plan.span(unit))]
        wanted_bytes = self._catch_up.bytes_to_fetch(
            time.monotonic(),
            origin_bytes=state.fetched_bytes,
            ring_bytes=self.received_bytes,
            left_bytes=len(self._own) * self.plan.unit_bytes,
        )
        count = -(-wanted_bytes // self.plan.unit_bytes)
        with self._choosing:
            more = self._next_foreign()[:count]
            self._untold.extend(more)  # before they leave the set: until it is empty, the sender goes on
            self._awaited.extend(more)
            self._foreign.difference_update(more)
        self._own += more
        self.extra_bytes += sum(end - begin for begin, end in map(self.plan.span, more))
        state.fetch_too(map(self.plan.span, more))

    def finish(self, report: Report, progress_seconds: float) -> None:
        """Wait until the next node has all units, and the node before knows that this one has.

        Raises:
            RankLostError: a neighbour is gone.
            ProgressTimeoutError: the next node takes nothing any more.
            RankloadError: any error of ``report``.
        """
        no_progress = NoProgressTimer(self._sent_bytes, _MAX_WAIT_SECONDS)
        while any(thread.is_alive() for thread in self._threads):
            report(Progress("sending", self._sent_bytes, None))
            if no_progress.seconds_without_progress(self._sent_bytes) > progress_seconds:
                is_sending = self._threads[-1].is_alive()
                link = self._downstream.link if is_sending else self._upstream.link
                raise ProgressTimeoutError(
                    f"rank {link.rank} on {link.host} has made no progress for {progress_seconds:g} s: a hung network, "
                    "or a hung disk there",
                    stuck_rank=link.rank,
                    stuck_host=link.host,
                )
            for thread in self._threads:
                thread.join(LOOK_SECONDS)
        if self._failure is not None:  # a transfer that has ended keeps no failure
            raise self._failure

    def stop(self) -> None:
        """End the threads. The connections stay open: see `rankload._relay.opening.open_relay`."""
        self._is_stopped.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _run(self, name: str, work: Callable[[], None], state: TransferState | Served) -> None:
        def guarded() -> None:
            try:
                work()
            except StoppedError:
                pass
            except Exception as error:
                self._failure = self._failure or error
                state.fail(error)

        thread = threading.Thread(target=guarded, name=f"rankload-ring-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)  # one that could not be started cannot be joined

    def _receive_units(self, state: TransferState, writer: PartialWriter) -> None:
        try:
            while (received := self._receive_unit()) is not None:
                unit, content, tag = received
                begin, end = self.plan.span(unit)
                with self._choosing:
                    is_awaited = unit in self._foreign
                    self._foreign.discard(unit)
                if is_awaited:
                    writer.write(content, begin)
                    writer.finished(begin, end)
                    self.received_bytes += end - begin
                    state.bring(begin, content)
                    self._ready.append((unit, tag))
            with self._choosing:
                lost_count = len(self._foreign)
            if lost_count:  # what this node fetches instead left the set before it told the node before
                raise CoordinationError(
                    f"{lost_count} units did not come from {self._sender}, which has sent all that this node lacks: "
                    "something between the nodes takes them away; nothing was published; check the network, choose "
                    "another one by GLOO_SOCKET_IFNAME, or pass scope='node'"
                )
        finally:
            writer.close()

    def _receive_unit(self) -> tuple[int, bytearray, bytes] | None:
        """Return the next unit, its bytes and its tag; None after the last."""
        head = bytes(self._upstream.receive(HEAD_BYTES))
        unit, length = read_head(head)
        begin, end = self.plan.span(unit) if unit in self.plan.units else (0, 0 if unit == END else -1)
        if length != end - begin:
            raise CoordinationError(f"{self._sender} sent unit {unit} with {length} bytes, which nobody expects")
        content = self._upstream.receive(length)
        tag = bytes(self._upstream.receive(TAG_BYTES))
        check_tag(self._key, head, content, tag, self._sender)
        return None if unit == END else (unit, content, tag)

    @property
    def _sender(self) -> str:
        return f"rank {self._upstream.link.rank} on {self._upstream.link.host}"

    def _ignore_units(self) -> None:
        """Wait until the node before knows that this one has all units."""
        while self._receive_unit() is not None:
            pass

    def _send_units(self, state: TransferState | Served, file: Partial | Served) -> None:
        looked_at: list[int] = []
        has_ended, heard = False, bytearray()
        with file.lent() as descriptor:
            while not has_ended or looked_at or self._awaited or self._untold or self._foreign:
                if not has_ended:
                    heard += self._downstream.receive_some()
                    whole = len(heard) // HAVE_BYTES * HAVE_BYTES
                    self._wanted.difference_update(read_haves(heard[:whole]))
                    del heard[:whole]
                while self._awaited and len(looked_at) < _LOOK_AHEAD:
                    looked_at.append(self._awaited.popleft())
                come = [unit for unit in looked_at if state.has(*self.plan.span(unit))]
                looked_at = [unit for unit in looked_at if unit not in come]
                while self._untold:
                    self._upstream.send_soon(have(self._untold.popleft()))
                self._upstream.send_soon()  # what was too much for the connection
                self._ready.extend((unit, None) for unit in come)
                if self._ready:
                    unit, tag = self._ready.popleft()
                    if unit in self._wanted:
                        self._send_unit(unit, tag, descriptor)
                elif not self._wanted and not has_ended:
                    head, has_ended = head_of(END, 0), True
                    self._downstream.send(head + tag_of(self._key, head, b""))
                elif self._is_stopped.is_set() or state.failure is not None:
                    raise StoppedError
                else:
                    time.sleep(_POLL_SECONDS)

    def _send_unit(self, unit: int, tag: bytes | None, descriptor: int) -> None:
        begin, end = self.plan.span(unit)
        content, head = _read(descriptor, begin, end), head_of(unit, end - begin)
        for part in (head, content, tag or tag_of(self._key, head, content)):
            self._downstream.send(part)
        self._sent_bytes += end - begin
        self._wanted.discard(unit)

    def _next_foreign(self) -> list[int]:
        """Return the units that only the ring was to bring, in the order in which this node would fetch them.

        The ring brings the first ones first. Each node begins in another place: what it fetches, it sends on.
        """
        left = sorted(self._foreign, reverse=True)
        begin = len(left) * self._member // len(self.plan.ranks)
        return left[begin:] + left[:begin]


def _read(descriptor: int, begin: int, end: int) -> bytes:
    """Read a unit of a file.

    Raises:
        CacheError: the disk cannot read it, or the file has become shorter.
    """
    content = b""
    try:
        while len(content) < end - begin:  # pread(2) returns early on some filesystems
            if not (more := os.pread(descriptor, end - begin - len(content), begin + len(content))):
                raise CacheError(f"the file to send became shorter: it ends at {begin + len(content)} now")
            content = content + more if content else more
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"cannot read the file to send: {error.strerror}", errno=error.errno) from error
    return content


class Served:
    """A complete file that a node sends: what `TransferState` and `Partial` are to a node that fetches.

    Args:
        descriptor: the open file.

    Attributes:
        failure: error that ended the exchange.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: Exception | None = None

    def has(self, begin: int, end: int) -> bool:
        """Return True: all is there."""
        return True

    @contextmanager
    def lent(self) -> Iterator[int]:
        """Lend a descriptor that stays open until the thread that reads has ended."""
        descriptor = os.dup(self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def fail(self, error: Exception) -> None:
        """Note the error that ends the exchange."""
        self.failure = self.failure or error
