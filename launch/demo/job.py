"""Runs the demo's job under torchrun, cold, and collects what its ranks report."""

import collections
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from demo.outcome import JobFailed, RankReport

_LAUNCH_DIR = Path(__file__).resolve().parent.parent
_LOG_TAIL_LINES = 100

# torchrun gives its ranks 30 s to end after a SIGTERM before it kills them itself.
_STOP_SECONDS = 40


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        way: ``"torch.hub"`` or ``"rankload"``.
        url: The checkpoint.
        ranks: How many processes.
        capacity: CREPE's, when the checkpoint is CREPE's and the ranks shall use it; else ``None``.
        check_hash: Whether the URL's file name carries a hash to check.
    """

    way: str
    url: str
    ranks: int
    capacity: str | None
    check_hash: bool


def run_job(job: Job, scratch_dir: Path) -> list[RankReport]:
    """Runs the job in an empty directory with a cache of its own and returns its reports by rank.

    Args:
        job: What to run.
        scratch_dir: Where cache, reports and log go; must exist and be empty.

    Raises:
        JobFailed: torchrun failed or a rank left no report.
    """
    reports_dir = scratch_dir / "reports"
    reports_dir.mkdir()
    log_path = scratch_dir / "log"
    with log_path.open("wb") as log:
        # A session of its own: Ctrl-C reaches only the demo, which then ends the job in order.
        process = subprocess.Popen(
            _command(job, reports_dir),
            env=_environment(job, scratch_dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            _stop(process)
    return _collect(job, process.returncode, reports_dir, log_path)


def _command(job: Job, reports_dir: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={job.ranks}", "--module", "demo.rank"]
    command += ["--way", job.way, "--url", job.url, "--reports-dir", str(reports_dir)]
    if job.capacity:
        command += ["--capacity", job.capacity]
    if job.check_hash:
        command += ["--check-hash"]
    return command


def _environment(job: Job, scratch_dir: Path) -> dict[str, str]:
    environment = dict(os.environ)
    # torchrun leaves its log directory behind when it is interrupted.
    environment["TMPDIR"] = str(scratch_dir)
    # Both ways cache where torch.hub does; an empty one makes the job cold.
    environment["TORCH_HOME"] = str(scratch_dir / "torch-home")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_LAUNCH_DIR), os.environ.get("PYTHONPATH")]))
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // job.ranks))
    # A proxy cannot reach this machine's loopback.
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    return environment


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends a job that still runs; torchrun passes SIGTERM on to its ranks."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _collect(job: Job, returncode: int, reports_dir: Path, log_path: Path) -> list[RankReport]:
    reports: list[RankReport] = []
    ranks_by_error = collections.defaultdict(list)
    for rank in range(job.ranks):
        path = reports_dir / f"rank-{rank}.json"
        # Absent when torchrun ended the rank because another one failed.
        text = path.read_text() if path.exists() else '{"error": ""}'
        error = json.loads(text).get("error")
        if error is None:
            reports.append(RankReport.from_json(text))
        elif error:
            ranks_by_error[error].append(rank)
    if returncode == 0 and len(reports) == job.ranks:
        return reports
    if ranks_by_error:
        raise JobFailed("\n".join(f"{_named(ranks)}: {error}" for error, ranks in ranks_by_error.items()))
    tail = log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    raise JobFailed("\n".join([f"torchrun ended with exit status {returncode}; its last lines:", *tail]))


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
