"""SIGTERM during a call: leave cleanly, tell the other ranks, then die of the signal as before."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception: nothing but clean-up may catch it."""


class TerminationAsException:
    """Turns SIGTERM into an exception while a call lasts.

    Only on the main thread, where Python runs signal handlers, and only where SIGTERM is at its default: a user's own
    handler is never replaced.
    """

    def __init__(self) -> None:
        self._is_installed = False
        self._raises = True
        self.has_arrived = False

    def install(self) -> None:
        """Install the handler where that is right."""
        is_right = threading.current_thread() is threading.main_thread()
        if is_right and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._is_installed = True
            signal.signal(signal.SIGTERM, self._on_signal)

    def defer(self) -> None:
        """Let no signal interrupt what follows; `restore` comes back to it."""
        self._raises = False

    def restore(self) -> None:
        """Remove the handler; if SIGTERM came, let it end the process now."""
        if self._is_installed:
            self._is_installed = False
            if signal.getsignal(signal.SIGTERM) == self._on_signal:  # else somebody set one of their own meanwhile
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self.has_arrived:
                os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # once: a second one, from an impatient scheduler, must not interrupt the clean-up of the first
        if self._raises and not self.has_arrived:
            self.has_arrived = True
            raise Terminated
        self.has_arrived = True
