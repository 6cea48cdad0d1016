"""Tell whether two processes belong to one job, without a connection between them."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rankload._coordination.launchers import identity_from_environment
from rankload.errors import ArgumentError

#: Environment variables that have one value on all ranks of a job, and usually another in the next job: torchrun's,
#: SLURM's, PMIx's, PMI's, PALS's and Open MPI 4's. Jobs at a fixed address may share all values, so `Turn.launched_at`
#: counts, too.
_MARKS = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "PMIX_NAMESPACE",
    "PMI_JOBID",
    "PALS_APID",
    "OMPI_MCA_ess_base_jobid",
)


@dataclass(frozen=True)
class Turn:
    """One call of this process, among its calls with the same key.

    The n-th calls of all ranks of a job belong together. A rank that calls less often than others finds later turns.

    Attributes:
        job: digest that identifies the job.
        number: how many calls with the key this process has made, this one included.
        launched_at: when the process that launched this one started, in seconds since the epoch; 0 if unknown. What is
            older belongs to an earlier job.
    """

    job: str
    number: int
    launched_at: float


_counts: Counter[str] = Counter()
_lock = threading.Lock()


def next_turn(key: str, environ: Mapping[str, str] | None = None) -> Turn | None:
    """Count a call, and return its turn; None if this process is not one of several ranks of a known job."""
    environ = os.environ if environ is None else environ
    marks = [f"{name}={environ[name]}" for name in _MARKS if environ.get(name)]
    try:
        is_alone = identity_from_environment(environ).world_size == 1
    except ArgumentError:  # the variables contradict each other; the patched code may work all the same
        return None
    if is_alone or not marks:
        return None
    with _lock:
        _counts[key] += 1
        number = _counts[key]
    return Turn(hashlib.sha256("\n".join(marks).encode()).hexdigest(), number, _started_at(os.getppid()))


def _started_at(pid: int) -> float:
    """Return when a process started, in seconds since the epoch (proc(5)); 0 if that is unknown."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0
