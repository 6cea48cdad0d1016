"""What a call costs one rank of a large job: CPU time, store operations and seconds, beside init_process_group.

Simulated ranks: processes forked from one that has imported everything, all on this machine. Each first uses the code
alone, so that it has memory pages of its own, as a process that was not forked: copying them takes 5 ms of CPU time,
more than what is measured. Then they begin together, and make one first call and several warm ones of a small
checkpoint; as many others make a gloo process group, and pass its barrier. Rank 0 hosts the store in both. gloo
connects two ranks when they first talk (TORCH_GLOO_LAZY_INIT), or else the half million connections of 1,024 ranks
would be what is measured.

Needs root: the ranks are in a network namespace without a name server. torch's TCPStore server looks up the name of
each client that connects, in its only thread; so a slow name server would be what is measured.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore

import rankload
from benchmarks.bounds import Bound
from benchmarks.table import Table
from harness.checkpoints import write_zip
from harness.namespace import Namespace, namespace
from harness.origin import Origin
from rankload import dist_fetch, dist_load_state_dict_from_url

_RANKS_PER_NODE = 8
_CALLS = 5  # warm calls, or barriers, in one round

#: Time that one set of ranks has, in seconds.
_DEADLINE_SECONDS = 120

_FIRST, _WARM, _INIT, _BARRIER = "rankload, first call", "rankload, warm call", "init_process_group", "barrier"
_STEPS = {"rankload": [_FIRST, *[_WARM] * _CALLS], "gloo": [_INIT, *[_BARRIER] * _CALLS]}

#: Where rank 0 hosts the store: the network namespace is the ranks' own, and no socket gets this port by chance.
_PORT = 29500

_PR_SET_PDEATHSIG = 1  # prctl(2), linux/prctl.h

#: Methods of a store client that each send the server one request or two.
_OPERATIONS = ("add", "check", "compare_set", "get", "set", "wait")


@dataclass(frozen=True)
class _Step:
    """One step of all ranks.

    Attributes:
        name: what it is.
        seconds: from the end of the step before, on the last rank, to the end of this one, on the last rank.
        cpu_seconds: mean of all ranks.
        host_cpu_seconds: of rank 0, in whose process the store's server runs.
        operations: store operations of Python code, mean of all ranks.
    """

    name: str
    seconds: float
    cpu_seconds: float
    host_cpu_seconds: float
    operations: float


def scale(world_sizes: Sequence[int], rounds: int, scratch: Path) -> Iterator[Table]:
    """Yield a table of seconds and one of CPU seconds per rank, of all world sizes."""
    checkpoint = write_zip(scratch)
    model_dir = scratch / "cache"
    with Origin() as origin:
        url = origin.add(checkpoint.path.name, checkpoint.path)
        dist_fetch(url, model_dir, sha256=checkpoint.sha256, progress=False)
    steps: dict[tuple[str, int], list[_Step]] = defaultdict(list)
    with namespace({"rank": "::ffff:127.0.0.1"}) as network:  # the server sees its clients as such
        for world_size, _, way in itertools.product(world_sizes, range(rounds), _STEPS):
            for step in _run(network, way, world_size, url, model_dir):
                steps[step.name, world_size].append(step)
                print(f"{world_size} ranks: {step}", file=sys.stderr)  # the tables come after some minutes
    rows = {f"{name}, {world_size:,} ranks": runs for (name, world_size), runs in steps.items()}
    small, large = f"{min(world_sizes):,} ranks", f"{max(world_sizes):,} ranks"
    title = f"scale, {os.cpu_count()} cores, ranks forked from one process, medians of {rounds}"
    yield Table(
        "scale-seconds",
        f"{title}; seconds until the last rank is through",
        {row: [step.seconds for step in runs] for row, runs in rows.items()},
        {
            f"{name}, {world_size:,} ranks": f"{median(step.seconds for step in runs) / world_size * 1e3:.2f} ms a rank"
            for (name, world_size), runs in steps.items()
        },
        [Bound(f"{_FIRST}, {large}", f"{_INIT}, {large}", at_most=2)],
    )
    yield Table(
        "scale-cpu",
        f"{title}; CPU seconds of a rank",
        {row: [step.cpu_seconds for step in runs] for row, runs in rows.items()},
        {
            row: f"{median(step.operations for step in runs):.1f} store operations a rank; "
            f"rank 0 and the store: {median(step.host_cpu_seconds for step in runs) * 1e3:.0f} ms"
            for row, runs in rows.items()
            if row.startswith("rankload")
        },
        [Bound(f"{_WARM}, {large}", f"{_WARM}, {small}", at_most=1.3)],
    )


def _run(network: Namespace, way: str, world_size: int, url: str, model_dir: Path) -> Iterator[_Step]:
    """Run one set of ranks; yield the medians of each kind of step."""
    command = [sys.executable, "-m", "benchmarks.scale", way, str(world_size), url, str(model_dir)]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = network.run_program(command, _DEADLINE_SECONDS + 60, env=environment)
    if result.exitcode:
        raise SystemExit(f"{world_size} ranks of {way}: {result.stderr}")
    runs = [_Step(*values) for values in json.loads(result.stdout.splitlines()[-1])]
    for name in dict.fromkeys(_STEPS[way]):
        values = [astuple(step)[1:] for step in runs if step.name == name]
        yield _Step(name, *map(median, zip(*values, strict=True)))


# --- in the namespace: the process that forks -------------------------------------------------------------------------


def _fork_ranks(way: str, world_size: int, url: str, model_dir: str) -> list[_Step]:
    """Run the ranks; return their steps."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for module in pkgutil.walk_packages(rankload.__path__, "rankload."):
        if not module.name.endswith("__main__") and module.name.split(".")[1] not in ("_cli", "integrations"):
            importlib.import_module(module.name)
    gate, opener = os.pipe()
    reader, writer = os.pipe()
    ranks: list[int] = []
    try:
        for rank in range(world_size):
            if (pid := os.fork()) == 0:
                os.close(opener)
                _be_rank(rank, world_size, gate, writer, url, model_dir, _STEPS[way])
            ranks.append(pid)
        os.close(writer)
        _read_lines(reader, world_size, time.monotonic() + _DEADLINE_SECONDS)  # all are ready
        began_at = time.monotonic()
        os.close(opener)
        results = _read_lines(reader, world_size, began_at + _DEADLINE_SECONDS)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)  # until it is waited for, a child's pid belongs to no other process
            os.waitpid(pid, 0)
    if len(results) < world_size:
        raise SystemExit(f"{world_size - len(results)} ranks were not through after {_DEADLINE_SECONDS} s")
    results.sort()
    if errors := [(rank, report) for rank, report in results if isinstance(report, str)]:
        raise SystemExit(f"{len(errors)} ranks failed: {errors[0]}")
    steps = []
    for number, name in enumerate(_STEPS[way]):
        ended, cpu_seconds, operations = zip(*(report[number] for _, report in results), strict=True)
        steps.append(_Step(name, max(ended) - began_at, mean(cpu_seconds), cpu_seconds[0], mean(operations)))
        began_at = max(ended)
    return steps


def _read_lines(descriptor: int, count: int, deadline: float) -> list[Any]:
    """Read what the ranks report, one JSON value in a line, until all have reported or the deadline."""
    text = b""
    while text.count(b"\n") < count and select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (more := os.read(descriptor, 1 << 20)):
            break  # all ranks were killed
        text += more
    return [json.loads(line) for line in text.splitlines()]


# --- in a rank --------------------------------------------------------------------------------------------------------


def _be_rank(
    rank: int, world_size: int, gate: int, writer: int, url: str, model_dir: str, steps: Sequence[str]
) -> None:
    """Take all steps. Report the end, CPU seconds and operations of each, or the error, and wait to be killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should the parent be killed
    local = {"LOCAL_RANK": rank % _RANKS_PER_NODE, "LOCAL_WORLD_SIZE": min(_RANKS_PER_NODE, world_size)}
    job = {"RANK": rank, "WORLD_SIZE": world_size, "GROUP_RANK": rank // _RANKS_PER_NODE}
    variables = {**job, **local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _PORT, "TORCH_GLOO_LAZY_INIT": 1}
    report: Any = []
    try:
        _use_the_code(url, model_dir)
        os.environ.update({name: str(value) for name, value in variables.items()})
        operations = _Operations()
        os.write(writer, b"0\n")
        os.read(gate, 1)  # returns when the parent opens the gate, for all ranks at once
        for step in steps:
            cpu, before = time.process_time(), operations.count
            _take(step, url, model_dir)
            report.append((time.monotonic(), time.process_time() - cpu, operations.count - before))
    except BaseException as error:
        report = f"{type(error).__name__}: {error}"[:2000]
    os.write(writer, json.dumps([rank, report]).encode() + b"\n")  # at once, since it is shorter than PIPE_BUF
    while True:  # others may still need the store, or a connection
        signal.pause()


def _use_the_code(url: str, model_dir: str) -> None:
    """Take all kinds of steps alone, in a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (_WARM, _BARRIER):
        _take(step, url, model_dir)
    dist.destroy_process_group()


def _take(step: str, url: str, model_dir: str) -> None:
    if step in (_FIRST, _WARM):
        dist_load_state_dict_from_url(url, model_dir, progress=False)
    elif step == _INIT:
        dist.init_process_group("gloo")
    else:
        dist.barrier()


class _Operations:
    """Counts the store operations of this process's Python code, and not those of torch's C++ code.

    Attributes:
        count: number of operations so far.
    """

    def __init__(self) -> None:
        self.count = 0
        for name in _OPERATIONS:
            setattr(TCPStore, name, self._counting(getattr(TCPStore, name)))

    def _counting(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return operation(*args, **kwargs)

        return counted


if __name__ == "__main__":
    way, world_size, url, model_dir = sys.argv[1:]
    print(json.dumps([astuple(step) for step in _fork_ranks(way, int(world_size), url, model_dir)]))
