"""Handle SIGTERM for calls on other threads than the main one.

Only the main thread may install a Python signal handler, and the handler runs only there. A handler of `faulthandler`
can be installed from any thread. It writes a few lines to a file: here, a pipe that one of rankload's threads reads.

Such a handler writes nothing on a thread that Python does not know, and a thread that is just starting is one. That
thread can receive a signal to the process before the main thread wakes up. So the many threads that a call starts block
SIGTERM, and leave it to other threads. A thread that other code starts at that moment can still lose the signal.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: How long calls may clean up before the signal ends the process in any case.
_GRACE_SECONDS = 5.0

_lock = threading.Lock()
_waiting: dict[int, Callable[[], None]] = {}
_pipe: _Pipe | None = None


def is_at_default(signum: signal.Signals) -> bool:
    """Return whether a signal has no handler, neither of Python code nor of a C library."""
    if signal.getsignal(signum) is not signal.SIG_DFL:
        return False
    with suppress(OSError, ValueError):  # no /proc
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("SigCgt:"):  # proc_pid_status(5): a mask, bit 0 for signal 1
                return not int(line.split()[1], 16) >> (signum - 1) & 1
    return True


def call_on_sigterm(token: int, on_signal: Callable[[], None]) -> bool:
    """Call a function on a separate thread when SIGTERM arrives.

    This thread and the threads that it starts block the signal until this thread calls `stop_waiting`.

    Args:
        token: identifies the function for `stop_waiting`.
        on_signal: called once the signal arrives. It must return at once.

    Returns:
        False if other code handles SIGTERM, or if no pipe or thread can be made.
    """
    global _pipe  # noqa: PLW0603  # a process has one handler for a signal
    with _lock:
        if _pipe is None:
            if not hasattr(faulthandler, "register") or not is_at_default(signal.SIGTERM):
                return False
            try:
                _pipe = _Pipe()
            except (OSError, RuntimeError):  # out of descriptors or threads: the call itself fails if it needs some
                return False
        _waiting[token] = on_signal
        _block_in_call.enter()
        return True


def stop_waiting(token: int) -> bool:
    """Forget a function, and remove the handler after the last one. Return whether no call waits for the signal."""
    global _pipe  # noqa: PLW0603
    _block_in_call.leave()
    with _lock:
        _waiting.pop(token, None)
        if _waiting or _pipe is None:
            return not _waiting
        _pipe.close()
        _pipe = None
        return True


class _Pipe:
    """The pipe that faulthandler's SIGTERM handler writes to, and the thread that reads it."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)  # a signal handler must not wait
        try:
            threading.Thread(target=self._read, name="rankload-sigterm", daemon=True).start()
        except RuntimeError:
            os.close(self._reader)
            os.close(self._writer)
            raise
        faulthandler.register(signal.SIGTERM, file=self._writer, all_threads=False, chain=False)

    def close(self) -> None:
        """Restore the default action, unless a handler was installed meanwhile, and end the thread."""
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            faulthandler.unregister(signal.SIGTERM)
        os.close(self._writer)

    def _read(self) -> None:
        has_arrived = bool(os.read(self._reader, 1))
        os.close(self._reader)
        if not has_arrived:
            return
        with _lock:
            calls = list(_waiting.values())
        for on_signal in calls:
            on_signal()
        threading.Event().wait(_GRACE_SECONDS)
        faulthandler.unregister(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


class _Block(threading.local):
    """Blocks SIGTERM on the thread that enters. Threads that it starts inherit the block."""

    _own: set[int | signal.Signals] | None = None  # signals that the thread had blocked before

    def enter(self) -> None:
        if self._own is None:
            self._own = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def leave(self) -> None:
        if self._own is not None:
            own, self._own = self._own, None
            signal.pthread_sigmask(signal.SIG_SETMASK, own)


_block_in_call, _block_in_fork = _Block(), _Block()


def _block_before_fork() -> None:
    """Block SIGTERM during a fork: the child still has the handler, which would write to the parent's pipe."""
    if _pipe is not None:
        _block_in_fork.enter()


def _forget_in_child() -> None:
    """Drop the handler in a forked child, which has no thread to read the pipe."""
    global _pipe, _lock
    if _pipe is not None:
        faulthandler.unregister(signal.SIGTERM)
    _pipe, _lock = None, threading.Lock()  # a thread that held the lock does not exist in the child
    _waiting.clear()
    _block_in_fork.leave()
    _block_in_call.leave()


os.register_at_fork(before=_block_before_fork, after_in_parent=_block_in_fork.leave, after_in_child=_forget_in_child)
