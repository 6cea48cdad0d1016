"""SIGTERM during a call: clean up, tell the other ranks, then let the signal end the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from rankload._coordination.thread_signals import call_on_sigterm, is_at_default, stop_waiting


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception: only clean-up code may catch it."""


class TerminationAsException:
    """Turns SIGTERM into an exception during a call. A handler of the user's own is never replaced.

    The exception is raised at once on the main thread, and by the next `check` on other threads.

    Attributes:
        has_arrived: whether SIGTERM has arrived.
    """

    def __init__(self) -> None:
        self.has_arrived = False
        self._is_installed = self._is_on_main_thread = False
        self._raises = True

    def install(self) -> None:
        """Install the handler if SIGTERM has its default action."""
        self._is_on_main_thread = threading.current_thread() is threading.main_thread()
        if not self._is_on_main_thread:
            self._is_installed = call_on_sigterm(id(self), self._note)
        elif is_at_default(signal.SIGTERM):
            self._is_installed = True
            signal.signal(signal.SIGTERM, self._on_signal)

    def check(self) -> None:
        """Raise Terminated, once, if SIGTERM has arrived during a call on another thread than the main one."""
        if self.has_arrived and self._raises and not self._is_on_main_thread:
            self._raises = False
            raise Terminated

    def defer(self) -> None:
        """Let SIGTERM no longer interrupt the call; `restore` acts on a signal that arrives from now on."""
        self._raises = False

    def restore(self) -> None:
        """Remove the handler. If SIGTERM arrived, let it end the process now, or after the last call has ended."""
        if not self._is_installed:
            return
        self._is_installed = False
        is_last = True
        if not self._is_on_main_thread:
            is_last = stop_waiting(id(self))
        elif signal.getsignal(signal.SIGTERM) == self._on_signal:  # else other code set a handler meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.has_arrived and is_last:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self) -> None:
        self.has_arrived = True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # raise only once: a second signal, from an impatient scheduler, must not interrupt the clean-up
        if self._raises and not self.has_arrived:
            self.has_arrived = True
            raise Terminated
        self.has_arrived = True
