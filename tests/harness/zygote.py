"""The process that starts all others: imports torch once, then forks in milliseconds.

It never starts a thread (a fork copies only the forking thread; a lock held by another would stay
locked for ever in the child) and it is the only parent: it alone reaps, so a signal can never hit a
recycled pid, and as a subreaper it also inherits and kills whatever a dead child left running.

It speaks JSON over a SOCK_SEQPACKET socket. Requests: ``{"start": directory}``,
``{"signal": number, "pid": pid, "group": bool}``. Events: ``started``, ``exited``, ``failed``. What to
run stands in ``job.pickle`` in the directory, which the child alone reads. When the socket closes
(the test process died, however) everything is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import faulthandler
import gc
import importlib
import importlib.util
import json
import operator
import os
import pickle
import resource
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Imported before the first rank is forked. rankload itself is not: a rank imports it under its own
# environment, as a user's process does.
PRELOADED = (
    "torch",
    "torch.distributed",
    "numpy",
    "safetensors.torch",
    "requests",
    "filelock",
    "tqdm",
    "pytest",
)

# Dumps the stacks of all threads. A real-time signal, so that tests and launchers keep USR1 and USR2.
STACK_DUMP_SIGNAL = signal.SIGRTMAX - 1

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Zygote:
    """The loop: requests from the socket, deaths from the kernel."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._is_preloaded = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a wake-up only comes with a Python handler
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def serve(self) -> Path | None:
        """Serves until the socket closes.

        Returns:
            In the zygote ``None``, at the end. In a forked child the directory of its job.
        """
        while True:
            readable, _, _ = select.select([self._control.fileno(), self._wake_read], [], [])
            if self._wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._reap()
            if self._control.fileno() in readable:
                packet = self._control.recv(65536)
                if not packet:
                    self._kill_everything()
                    return None
                request = json.loads(packet)
                if "start" in request:
                    directory = Path(request["start"])
                    if self._start(directory, request["preload"]) == 0:
                        return directory
                else:
                    self._signal(request["pid"], request["signal"], request["group"])

    def _start(self, directory: Path, preload: bool) -> int:
        try:
            if preload:
                self._preload()
            parent = os.getpid()
            pid = os.fork()
        except BaseException:
            self._send(failed=str(directory), why=traceback.format_exc())
            return -1
        if pid == 0:
            self._become_child(parent)
            return 0
        self._children.add(pid)
        self._send(started=str(directory), pid=pid)
        return pid

    def _preload(self) -> None:
        if self._is_preloaded:
            return
        for name in PRELOADED:
            importlib.import_module(name)
        threads = os.listdir("/proc/self/task")
        if len(threads) != 1:
            raise RuntimeError(f"an import of {PRELOADED} started {len(threads) - 1} threads: forking is unsafe")
        gc.collect()
        gc.freeze()  # or the first collection in every child would copy all pages that hold objects
        self._is_preloaded = True

    def _become_child(self, parent: int) -> None:
        os.setsid()
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _reap(self) -> None:
        while True:
            try:
                # WNOWAIT: while the leader is a zombie its process group id cannot be given to others.
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid in self._children:
                self._signal(dead.si_pid, signal.SIGKILL, group=True)
            _, status, usage = os.wait4(dead.si_pid, 0)
            if dead.si_pid in self._children:
                self._children.remove(dead.si_pid)
                self._send(
                    exited=dead.si_pid,
                    exitcode=os.waitstatus_to_exitcode(status),
                    ended_at=time.monotonic(),
                    peak_rss_bytes=usage.ru_maxrss * 1024,
                )
            self._kill_orphans()

    def _kill_orphans(self) -> None:
        own = os.getpid()
        for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split():
            if int(pid) not in self._children:
                os.kill(int(pid), signal.SIGKILL)

    def _signal(self, pid: int, number: int, group: bool) -> None:
        if pid not in self._children:
            return  # reaped; the event is on its way
        if group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
                return
        os.kill(pid, number)  # also when the child has not reached setsid yet

    def _kill_everything(self) -> None:
        for pid in self._children:
            self._signal(pid, signal.SIGKILL, group=True)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
                self._kill_orphans()

    def _send(self, **event: Any) -> None:
        # The test process is gone: the next recv says so, and ends everything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(json.dumps(event).encode())


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when ``parent`` dies, even by SIGKILL."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def perform(directory: Path) -> NoReturn:
    """Runs the job of ``directory`` in this process, as a freshly started program would."""
    job = pickle.loads((directory / "job.pickle").read_bytes())
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["working_dir"])
    _redirect(directory)
    if job["argv"]:
        _execute(job["argv"])
    sys.path[:] = job["sys_path"]
    stacks = open(directory / "stacks", "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(STACK_DUMP_SIGNAL, file=stacks, all_threads=True)
    _call(job, directory)


def _redirect(directory: Path) -> None:
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # New text layers: the zygote's were made for another file. By lines, so that a SIGKILL loses none.
    sys.stdout = sys.__stdout__ = _text_layer(1, "strict")  # type: ignore[misc,assignment]
    sys.stderr = sys.__stderr__ = _text_layer(2, "backslashreplace")  # type: ignore[misc,assignment]


def _text_layer(descriptor: int, errors: str) -> TextIO:
    return open(descriptor, "w", buffering=1, closefd=False, errors=errors)


def _execute(argv: list[str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would hand that on
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"cannot run {argv[0]}: {error}", file=sys.stderr)
        os._exit(127 if error.errno == errno.ENOENT else 126)


def _call(job: dict[str, Any], directory: Path) -> NoReturn:
    from harness import rank

    rank.attach(directory)
    started = time.perf_counter()
    try:
        module = _import_module(job["module"], job["module_path"])
        function = operator.attrgetter(job["qualname"])(module)
        args, kwargs = pickle.loads(job["arguments"])
        started = time.perf_counter()
        value = function(*args, **kwargs)
        seconds = time.perf_counter() - started
        outcome = {"value": pickle.dumps(value), "seconds": seconds}
    except SystemExit:
        raise
    except BaseException as error:
        outcome = {"exception": _describe(error), "seconds": time.perf_counter() - started}
        rank.write_atomically(directory / "outcome.pickle", pickle.dumps(outcome))
        traceback.print_exc()
        _leave(1, job["tears_down"])
    rank.write_atomically(directory / "outcome.pickle", pickle.dumps(outcome))
    _leave(0, job["tears_down"])


def _leave(exitcode: int, tears_down: bool) -> NoReturn:
    """Takes the ordinary way out, perhaps but for the interpreter's teardown, which costs 0.25 s of CPU after torch."""
    if tears_down:
        sys.exit(exitcode)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads that are no daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exitcode)


def _import_module(name: str, path: str) -> Any:
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == path:
        return loaded
    if "." in name:
        return importlib.import_module(name)
    # By path: two test folders may each have a module of this name.
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _describe(error: BaseException) -> dict[str, Any]:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        pickled = None  # such a class has no copy in the test process; name and text still get there
    return {
        "type_name": type(error).__qualname__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "pickled": pickled,
    }


def start(control_descriptor: int, scratch_dir: str) -> None:
    """Entry point of the zygote's interpreter, and so of every process that is forked from it.

    The zygote itself does not ask to die with the test process: it has to clean up after it.
    """
    os.set_inheritable(control_descriptor, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    directory = Zygote(socket.socket(fileno=control_descriptor)).serve()
    if directory is not None:
        perform(directory)
    shutil.rmtree(scratch_dir, ignore_errors=True)
