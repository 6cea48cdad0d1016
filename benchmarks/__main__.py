"""Compares the ways in one run, interleaved, and prints medians and ratios.

cold: the file comes from nginx on loopback, into an empty cache directory; the floor is ``curl -o x && sync x``.
warm: the file lies in the cache; memory is what all ranks hold (summed PSS) after touching
every page, above what they held before the call.
fetch: one process, no ranks, without loading; see ``benchmarks.fetch``.
modules: into modules, replicated, on meta and sharded; see ``benchmarks.modules``.
broadcast: from one node to three others over links of 1 Gbit/s; see ``benchmarks.broadcast``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.broadcast import broadcast
from benchmarks.fetch import CURL, LIMITED_SIZE_BYTES, fetch
from benchmarks.modules import modules
from benchmarks.ways import WAYS, Way, timed
from harness.checkpoints import CheckpointFile, write_big
from harness.nginx import Nginx, nginx
from harness.ranks import start_ranks
from rankload import dist_fetch


def cold(server: Nginx, checkpoint: CheckpointFile, world_size: int, rounds: int, scratch: Path) -> None:
    """Print seconds of the slowest rank for every way, beside curl's."""
    url, size_bytes = server.url(checkpoint.path.name), checkpoint.path.stat().st_size
    seconds: dict[str, list[float]] = {CURL.name: []}
    served: dict[str, float] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            seconds[CURL.name].append(CURL.seconds(url, Path(directory), checkpoint))
        for way in WAYS:
            before = sum(access.bytes for access in server.accesses())
            with tempfile.TemporaryDirectory(dir=scratch) as model_dir:
                seconds.setdefault(way.name, []).append(_run(way, url, world_size, model_dir)[0])
            served[way.name] = (sum(access.bytes for access in server.accesses()) - before) / size_bytes
    floor = statistics.median(seconds[CURL.name])
    print(f"\ncold, {world_size} ranks, {size_bytes / 1e9:.2f} GB, medians of {rounds}, slowest rank's call")
    for name, values in seconds.items():
        copies = f"origin served {served[name]:.2f} files" if name in served else "one process, not verified"
        spread = f"({min(values):.2f}-{max(values):.2f})"
        median = statistics.median(values)
        print(f"  {name:30} {median:6.2f} s {spread:14} {median / floor:5.2f} x curl  {copies}")


def warm(server: Nginx, checkpoint: CheckpointFile, world_size: int, rounds: int, scratch: Path) -> None:
    """Print seconds of the slowest rank and memory of all for every way."""
    url, size_bytes = server.url(checkpoint.path.name), checkpoint.path.stat().st_size
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as model_dir:
        dist_fetch(url, model_dir, check_hash=True)
        for _ in range(rounds):
            for way in WAYS:
                results.setdefault(way.name, []).append(_run(way, url, world_size, model_dir))
    ours = statistics.median(seconds for seconds, _ in results[WAYS[0].name])
    print(f"\nwarm, {world_size} ranks, {size_bytes / 1e9:.2f} GB, medians of {rounds}, slowest rank's call")
    for name, values in results.items():
        seconds = statistics.median(value[0] for value in values)
        copies = statistics.median(value[1] for value in values) / size_bytes
        print(f"  {name:30} {seconds:7.3f} s {seconds / ours:7.1f} x rankload  memory {copies:.2f} x the file")


def _run(way: Way, url: str, world_size: int, model_dir: str) -> tuple[float, float]:
    """Return the slowest rank's seconds, and the memory that all ranks hold after touching every page, in bytes."""
    with start_ranks(timed, world_size, args=(way.load, url, model_dir)) as group:
        group.wait_for_mark("ready")
        before = sum(group.pss_bytes())
        group.open_gate("ready")
        group.wait_for_mark("touched", timeout_seconds=300)
        held = sum(group.pss_bytes()) - before
        group.open_gate("touched")
        return max(result.value for result in group.wait()), held


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "case", nargs="?", choices=["cold", "warm", "fetch", "modules", "broadcast", "all"], default="all"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--size-mb", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=9, help="of the transformer for modules; 9 are 1.19 GB")
    parser.add_argument("--directory", type=Path, help="a disk for files and caches (default: the temporary directory)")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        if arguments.case in ("modules", "all"):
            modules(arguments.layers, arguments.ranks, arguments.rounds, root)
        if arguments.case in ("broadcast", "all"):
            broadcast(arguments.rounds)
        if arguments.case in ("modules", "broadcast"):
            raise SystemExit
        checkpoint = write_big(root, arguments.size_mb * 1_000_000)
        with nginx(root) as server:
            for case in (cold, warm):
                if arguments.case in (case.__name__, "all"):
                    case(server, checkpoint, arguments.ranks, arguments.rounds, root)
        if arguments.case in ("fetch", "all"):
            limited = checkpoint
            if checkpoint.size > LIMITED_SIZE_BYTES:
                limited = write_big(root, LIMITED_SIZE_BYTES, "limited")
            fetch(checkpoint, limited, arguments.rounds, root)
