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

    def install(self) -> None:
        """Install the handler where that is right."""
        is_right = threading.current_thread() is threading.main_thread()
        if is_right and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _raise)
            self._is_installed = True

    def restore(self, error: BaseException | None) -> None:
        """Remove the handler; if SIGTERM ended the call, let it end the process now."""
        if self._is_installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._is_installed = False
            if isinstance(error, Terminated):
                os.kill(os.getpid(), signal.SIGTERM)

    def name_of(self, error: BaseException) -> str:
        """Name what interrupted the call."""
        return "SIGTERM" if isinstance(error, Terminated) else type(error).__name__


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Terminated
