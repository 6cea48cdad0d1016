"""Loads one checkpoint into every rank of a job twice, cold, and shows what each way cost.

First with torch.hub in every rank, as people do it today; then with rankload.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import unquote, urlsplit

import fetch_weights
from demo import memory, table
from demo.job import Job, run_job
from demo.origin import Origin
from demo.outcome import JobFailed, JobReport, RankReport

# 1 Gbit/s, the uplink of many a machine room: loopback alone is faster than any origin that people load from.
_DEFAULT_RATE_MB = 125.0

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def show_own_weights(options: argparse.Namespace) -> int:
    """The demo as it comes: CREPE's checkpoint from the embedded origin. Returns the exit status."""
    # Inside the environment that runs this, so that it goes when that goes.
    weights_dir = options.weights_dir or Path(sys.prefix) / "share" / "rankload-demo"
    [path] = fetch_weights.fetch(weights_dir, [options.capacity])
    size = table.megabytes(path.stat().st_size)
    print(f"{options.ranks} ranks load {path.name} ({size}) into a DDP job, each time with an empty cache.")
    print(f"Origin: a server on loopback, {_described(options.rate)}.")
    return _conclude([_run_on_origin(way, path, options) for way in table.WAYS])


def show_url(options: argparse.Namespace) -> int:
    """The same with the user's own URL: load only. Returns the exit status."""
    parts = urlsplit(options.url)
    name = Path(unquote(parts.path)).name or parts.netloc
    print(f"{options.ranks} ranks load {name}, each time with an empty cache.")
    jobs = []
    for way in table.WAYS:
        _announce(way)
        try:
            ranks = _run_cold(Job(way, options.url, options.ranks, None, options.check_hash))
        except JobFailed as failed:
            # torch.hub takes less (no plain paths, for one); that is no failure of the demo.
            if way == "rankload":
                raise
            print(_indented(str(failed)))
        else:
            jobs.append(_shown(JobReport(way, ranks, None)))
    return _conclude(jobs)


def _run_on_origin(way: str, path: Path, options: argparse.Namespace) -> JobReport:
    _announce(way)
    with Origin(path, options.rate * 1e6 or None) as origin:
        ranks = _run_cold(Job(way, origin.url, options.ranks, options.capacity, check_hash=True))
    return _shown(JobReport(way, ranks, origin.served))


def _run_cold(job: Job) -> list[RankReport]:
    with tempfile.TemporaryDirectory(prefix="rankload-demo-") as scratch:
        return run_job(job, Path(scratch))


def _announce(way: str) -> None:
    print(f"\n{table.WAYS[way]}", flush=True)


def _shown(report: JobReport) -> JobReport:
    print("\n".join(table.job_lines(report)), flush=True)
    return report


def _conclude(jobs: Sequence[JobReport]) -> int:
    print(f"\n{table.memory_note(memory.kind())}\n")
    fingerprints = {job.way: job.ranks[0].fingerprint for job in jobs}
    if len(set(fingerprints.values())) > 1:
        print(f"demo: the two ways loaded different weights: {fingerprints}", file=sys.stderr)
        return 1
    if len(jobs) == 2:
        print("\n".join(table.comparison_lines(*jobs)) + "\n")
    print("\n".join(table.agreement_lines(jobs)))
    return 0


def _described(rate_mb: float) -> str:
    if not rate_mb:
        return "as fast as it goes"
    return f"limited to {rate_mb:g} MB/s in total, like an origin behind a {rate_mb / 125:g} Gbit/s link"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _rate(text: str) -> float:
    rate = float(text)
    if rate < 0:
        raise ValueError(text)
    return rate


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__)
    parser.add_argument("url", nargs="?", metavar="URL", help="a checkpoint of your own (default: CREPE's)")
    parser.add_argument("--ranks", type=_positive, default=4, metavar="N", help="processes in the job (default: 4)")
    parser.add_argument("--check-hash", action="store_true", help="check the hash in the name of URL's file")
    own = parser.add_argument_group("without a URL")
    own.add_argument("--capacity", choices=fetch_weights.CAPACITIES, default="full", help="CREPE's size")
    own.add_argument(
        "--rate",
        type=_rate,
        default=_DEFAULT_RATE_MB,
        metavar="MB/S",
        help="what the origin gives to all downloads together; 0: no limit (default: %(default)g)",
    )
    own.add_argument("--weights-dir", type=Path, help="where to keep CREPE's weights (default: in .venv)")
    parser.epilog = "The caches go to TMPDIR; torch.hub's ranks hold up to one copy each there at a time."
    return parser.parse_args()


def _raise_exit(number: int, frame: FrameType | None) -> None:
    """Unwinds, so that the job is stopped and the caches are removed before the demo ends."""
    for further in _ENDING_SIGNALS:
        # A second Ctrl-C would cut that short and leave ranks behind.
        signal.signal(further, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _run() -> int:
    options = _parse()
    for number in _ENDING_SIGNALS:
        signal.signal(number, _raise_exit)
    try:
        return show_url(options) if options.url else show_own_weights(options)
    except JobFailed as failed:
        print(f"demo: the job failed.\n{_indented(str(failed))}", file=sys.stderr)
    except fetch_weights.WeightsUnavailable as error:
        print(f"demo: no weights. {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(_run())
