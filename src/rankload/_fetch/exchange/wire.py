"""A connection to a neighbour in the ring, for threads that must end when the exchange does."""

from __future__ import annotations

import select
import threading
from contextlib import suppress

from rankload._relay.links import WORD_SECONDS, Link

#: How often a thread that waits looks whether the exchange has ended.
LOOK_SECONDS = 0.1

_HAVE_BUFFER_BYTES = 4096


class StoppedError(Exception):
    """The exchange has ended; its leader's thread says why."""


class Wire:
    """A connection to a neighbour. One thread may receive while another sends.

    Args:
        link: the connection.
        is_stopped: set when the exchange ends.
    """

    def __init__(self, link: Link, is_stopped: threading.Event) -> None:
        self.link, self._is_stopped = link, is_stopped
        self._unsent = bytearray()

    def receive(self, length: int) -> bytearray:
        """Wait for so many bytes.

        Raises:
            RankLostError: the neighbour is gone.
            StoppedError: the exchange has ended.
        """
        content, done = bytearray(length), 0
        view = memoryview(content)
        while done < length:
            self._await(select.POLLIN)
            with suppress(BlockingIOError):
                done += self._received_into(view[done:])
        return content

    def receive_some(self) -> bytes:
        """Return the bytes that have come, without waiting. Raises like `receive`."""
        content = bytearray(_HAVE_BUFFER_BYTES)
        try:
            return bytes(content[: self._received_into(memoryview(content))])
        except BlockingIOError:
            return b""

    def send(self, content: bytes | bytearray | memoryview) -> None:
        """Send bytes, and wait while the neighbour takes none. Raises like `receive`."""
        rest = memoryview(content)
        while rest:
            self._await(select.POLLOUT)
            with suppress(BlockingIOError):
                rest = rest[self._sent(rest) :]

    def send_soon(self, message: bytes = b"") -> None:
        """Send a message, or as much of it as the neighbour takes now; the rest with the next one. Never waits."""
        self._unsent += message
        with suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._sent(memoryview(bytes(self._unsent)))]

    def _received_into(self, view: memoryview) -> int:
        try:
            count = self.link.socket.recv_into(view)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._lost(error) from error
        if not count:
            raise self._lost(None)
        return count

    def _sent(self, content: memoryview) -> int:
        try:
            return self.link.socket.send(content)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._lost(error) from error

    def _await(self, event: int) -> None:
        poll = select.poll()
        poll.register(self.link.socket, event)
        is_ready = False
        while not is_ready:
            if self._is_stopped.is_set():  # a neighbour that is never slow must not keep the thread
                raise StoppedError
            is_ready = bool(poll.poll(LOOK_SECONDS * 1000))

    def _lost(self, error: OSError | None) -> Exception:
        """Return the error for a broken connection, after a moment in which the other rank may tell its own."""
        return StoppedError() if self._is_stopped.wait(WORD_SECONDS) else self.link.broken(error)
