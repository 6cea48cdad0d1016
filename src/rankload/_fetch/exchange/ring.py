"""A node's place in the ring: two threads, one that receives units from the node before, one that sends to the next."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rankload._fetch.exchange.frames import HEAD_BYTES, TAG_BYTES, check_tag, head_of, read_head, tag_of
from rankload._fetch.exchange.plan import ExchangePlan
from rankload._fetch.origins.origin import Version
from rankload._fetch.partials.partial import Partial
from rankload._fetch.transfer.state import TransferState
from rankload._platform.clock import NoProgressTimer
from rankload._relay.links import WORD_SECONDS, Link
from rankload._types import Progress, Report
from rankload.errors import CacheError, CoordinationError, ProgressTimeoutError

#: How often threads look whether the transfer has ended.
_LOOK_SECONDS = 0.1

#: How often the sender looks whether another of its own units has come from the origin.
_POLL_SECONDS = 0.005

#: Longest time that one wait may count towards a deadline. A longer one means that this process was stopped.
_MAX_WAIT_SECONDS = 6.0

#: Time for a thread to end after the sockets are closed.
_JOIN_SECONDS = 1.0


class Ring:
    """Exchanges units with the neighbours while a transfer fetches this node's own.

    Args:
        plan: which node brings what.
        member: index of this node.
        version: version of the file, the same on all nodes.
        upstream, downstream: connections from the node before, and to the next.
        key: key that authenticates units; all nodes of the job share it, and nobody else knows it.

    Attributes:
        plan: which node brings what.
        version: version of the file.
        bytes_received: bytes of units that came from the ring.
    """

    def __init__(
        self, plan: ExchangePlan, member: int, version: Version, upstream: Link, downstream: Link, key: bytes
    ) -> None:
        self.plan, self._member, self.version = plan, member, version
        self._upstream, self._downstream, self._key = upstream, downstream, key
        self.bytes_received = 0
        self._bytes_sent = 0
        self._is_stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._arrived: deque[tuple[int, bytes]] = deque()  # units to forward, with their tags

    @property
    def is_fetched(self) -> bool:
        """Whether any node fetches a part from the origin."""
        return any(self.plan.fetched_by(member) for member in range(len(self.plan.members)))

    def awaited_link(self, state: TransferState) -> Link | None:
        """Return the node before if nothing but its units is missing; None if this node's own part is, too."""
        own = map(self.plan.span, self.plan.fetched_by(self._member))
        return self._upstream if all(state.has(begin, end) for begin, end in own) else None

    def start(self, state: TransferState, partial: Partial) -> None:
        """Leave to the other nodes what they bring, and begin to receive and to send."""
        foreign = [self.plan.span(unit) for unit in self.plan.received_by(self._member)]
        state.leave_to_others(self.version, foreign)
        self._run("receive", lambda: self._receive_units(state, partial), state)
        self._run("send", lambda: self._send_units(state, partial), state)

    def start_serving(self, file: Served) -> None:
        """Begin to send a file that this node has as a whole."""
        self._run("send", lambda: self._send_units(file, file), file)

    def _run(self, name: str, work: Callable[[], None], state: TransferState | Served) -> None:
        thread = threading.Thread(target=self._guarded, args=(work, state), name=f"rankload-ring-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)  # one that could not be started cannot be joined

    def finish(self, state: TransferState | Served, report: Report, progress_seconds: float) -> None:
        """Wait until the next node has got from this one all that it needs.

        Raises:
            RankLostError: a neighbour is gone.
            ProgressTimeoutError: the next node takes nothing any more.
            RankloadError: any error of ``report``.
        """
        no_progress = NoProgressTimer(self._bytes_sent, _MAX_WAIT_SECONDS)
        while any(thread.is_alive() for thread in self._threads):
            report(Progress("sending", self._bytes_sent, None))
            if no_progress.seconds_without_progress(self._bytes_sent) > progress_seconds:
                link = self._downstream
                raise ProgressTimeoutError(
                    f"rank {link.rank} on {link.host} has taken no byte for {progress_seconds:g} s: a hung network, or "
                    "a hung disk there",
                    stuck_rank=link.rank,
                    stuck_host=link.host,
                )
            for thread in self._threads:
                thread.join(_LOOK_SECONDS)
        if state.failure is not None:
            raise state.failure

    def stop(self) -> None:
        """End the threads. The connections stay open: see `rankload._relay.opening.open_relay`."""
        self._is_stopped.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _guarded(self, work: Callable[[], None], state: TransferState | Served) -> None:
        try:
            work()
        except _StoppedError:
            pass
        except Exception as error:
            state.fail(error)

    def _receive_units(self, state: TransferState, partial: Partial) -> None:
        awaited = set(self.plan.received_by(self._member))
        forwarded = set(self.plan.sent_by(self._member))
        sender = f"rank {self._upstream.rank} on {self._upstream.host}"
        writer = partial.writer()
        try:
            while awaited:
                head = bytes(self._receive(HEAD_BYTES))
                unit, length = read_head(head)
                begin, end = self.plan.span(unit) if unit in awaited else (0, -1)
                if length != end - begin:
                    raise CoordinationError(f"{sender} sent unit {unit} with {length} bytes, which nobody expects")
                content = self._receive(length)
                tag = bytes(self._receive(TAG_BYTES))
                check_tag(self._key, head, content, tag, sender)
                writer.write(content, begin)
                writer.finished(begin, end)
                state.accept(begin, content)
                self.bytes_received += length
                awaited.discard(unit)
                if unit in forwarded:
                    self._arrived.append((unit, tag))
                with state.changed:
                    state.changed.notify_all()
        finally:
            writer.close()

    def _send_units(self, state: TransferState | Served, file: Partial | Served) -> None:
        own, left = deque(self._own_units()), len(self.plan.sent_by(self._member))
        with file.lent() as descriptor:
            while left:
                tag: bytes | None = None
                if self._arrived:
                    unit, tag = self._arrived.popleft()
                elif own and state.has(*self.plan.span(own[0])):
                    unit = own.popleft()
                else:
                    self._check_goes_on(state)
                    time.sleep(_POLL_SECONDS)
                    continue
                begin, end = self.plan.span(unit)
                content = _read(descriptor, begin, end)
                head = head_of(unit, end - begin)
                for part in (head, content, tag or tag_of(self._key, head, content)):
                    self._send(memoryview(part))
                self._bytes_sent += end - begin
                left -= 1

    def _own_units(self) -> list[int]:
        """Return the units to send that do not come from the ring."""
        received = set(self.plan.received_by(self._member))
        return [unit for unit in self.plan.sent_by(self._member) if unit not in received]

    def _receive(self, length: int) -> bytearray:
        content, done = bytearray(length), 0
        view = memoryview(content)
        while done < length:
            self._await(self._upstream.socket, select.POLLIN)
            with suppress(BlockingIOError):
                try:
                    count = self._upstream.socket.recv_into(view[done:])
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    raise self._lost(self._upstream, error) from error
                if not count:
                    raise self._lost(self._upstream, None)
                done += count
        return content

    def _send(self, content: memoryview) -> None:
        while content:
            self._await(self._downstream.socket, select.POLLOUT)
            with suppress(BlockingIOError):
                try:
                    content = content[self._downstream.socket.send(content) :]
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    raise self._lost(self._downstream, error) from error

    def _await(self, connection: socket.socket, event: int) -> None:
        poll = select.poll()
        poll.register(connection, event)
        while not poll.poll(_LOOK_SECONDS * 1000):
            if self._is_stopped.is_set():
                raise _StoppedError

    def _check_goes_on(self, state: TransferState | Served) -> None:
        if self._is_stopped.is_set() or state.failure is not None:
            raise _StoppedError

    def _lost(self, link: Link, error: OSError | None) -> Exception:
        """Return the error for a broken connection, after a moment in which the other rank may tell its own."""
        return _StoppedError() if self._is_stopped.wait(WORD_SECONDS) else link.broken(error)


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
        """Lend the descriptor, which stays open."""
        yield self._descriptor

    def fail(self, error: Exception) -> None:
        """Note the error that ends the exchange."""
        self.failure = self.failure or error


class _StoppedError(Exception):
    """The transfer has ended; its thread says why."""
