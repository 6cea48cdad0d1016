"""Compares the ways in one run, interleaved, and prints medians and ratios.

cold: the file comes from nginx on loopback, into an empty cache directory; the floor is ``curl -o x && sync x``.
warm: the file lies in the cache; memory is what all ranks hold (summed PSS) after touching
every page, above what they held before the call.
imports: the first call of new processes; see ``benchmarks.imports``.
fetch: one process, no ranks, without loading; see ``benchmarks.fetch``.
modules: into modules, replicated, on meta and sharded; see ``benchmarks.modules``.
gpu: into modules on an accelerator, where there is one; see ``benchmarks.gpu``.
broadcast: from one node to three others over links of 1 Gbit/s; see ``benchmarks.broadcast``.
scale: what a call costs one of many ranks; see ``benchmarks.scale``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bounds import Bound
from benchmarks.broadcast import broadcast
from benchmarks.exchange import exchange
from benchmarks.fetch import CURL, LIMITED_SIZE_BYTES, fetch
from benchmarks.gpu import gpu
from benchmarks.imports import imports
from benchmarks.modules import modules
from benchmarks.rounds import interleaved
from benchmarks.scale import scale
from benchmarks.table import Table
from benchmarks.ways import WAYS, Way, timed
from harness.checkpoints import CheckpointFile, write_big
from harness.nginx import Nginx, nginx
from harness.ranks import start_ranks
from rankload import dist_fetch


def cold(server: Nginx, checkpoint: CheckpointFile, world_size: int, rounds: int, scratch: Path) -> Table:
    """Seconds of the slowest rank for every way, beside curl's, and what the origin served."""
    url, size_bytes = server.url(checkpoint.path.name), checkpoint.path.stat().st_size
    seconds: dict[str, list[float]] = {CURL.name: []}
    notes = {CURL.name: "one process, not verified"}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            seconds[CURL.name].append(CURL.seconds(url, Path(directory), checkpoint))
        for way in WAYS:
            before = sum(access.bytes for access in server.accesses())
            with tempfile.TemporaryDirectory(dir=scratch) as model_dir:
                seconds.setdefault(way.name, []).append(_run(way, url, world_size, model_dir)[0])
            served = (sum(access.bytes for access in server.accesses()) - before) / size_bytes
            notes[way.name] = f"origin served {served:.2f} files"
    title = f"cold, {world_size} ranks, {size_bytes / 1e9:.2f} GB, medians of {rounds}, slowest rank's call"
    return Table("cold", title, seconds, notes, [Bound(way.name, WAYS[0].name) for way in WAYS[1:]])


def warm(server: Nginx, checkpoint: CheckpointFile, world_size: int, rounds: int, scratch: Path) -> Table:
    """Seconds of the slowest rank for every way, and memory of all."""
    url, size_bytes = server.url(checkpoint.path.name), checkpoint.path.stat().st_size
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as model_dir:
        dist_fetch(url, model_dir, check_hash=True)
        for way in interleaved(WAYS, rounds):
            results.setdefault(way.name, []).append(_run(way, url, world_size, model_dir))
    return Table(
        "warm",
        f"warm, {world_size} ranks, {size_bytes / 1e9:.2f} GB, medians of {rounds}, slowest rank's call",
        {name: [seconds for seconds, _ in runs] for name, runs in results.items()},
        {
            name: f"memory {statistics.median(held for _, held in runs) / size_bytes:.2f} x the file"
            for name, runs in results.items()
        },
        [Bound(way.name, WAYS[0].name) for way in WAYS[1:]],
    )


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


def _tables(arguments: argparse.Namespace, root: Path) -> Iterator[Table]:
    def is_asked_for(*cases: str) -> bool:
        return arguments.case in (*cases, "all")

    if is_asked_for("modules"):
        yield from modules(
            arguments.only, arguments.layers, arguments.ranks, arguments.rounds, root, is_cold=arguments.cold
        )
    if is_asked_for("gpu") and torch.accelerator.is_available():
        yield from gpu(arguments.only, arguments.layers, arguments.ranks, arguments.rounds, root)
    if is_asked_for("imports"):
        yield from imports(arguments.rounds, root)
    if is_asked_for("broadcast"):
        yield broadcast(arguments.rounds)
    if is_asked_for("exchange"):
        yield from exchange(min(arguments.size_mb, 256), arguments.rounds)
    if is_asked_for("scale"):
        yield from scale(arguments.world_sizes, arguments.rounds, root)
    if not is_asked_for("cold", "warm", "fetch"):
        return
    checkpoint = write_big(root, arguments.size_mb * 1_000_000)
    with nginx(root) as server:
        for case in (cold, warm):
            if is_asked_for(case.__name__):
                yield case(server, checkpoint, arguments.ranks, arguments.rounds, root)
    if is_asked_for("fetch"):
        limited = checkpoint
        if checkpoint.size > LIMITED_SIZE_BYTES:
            limited = write_big(root, LIMITED_SIZE_BYTES, "limited")
        yield from fetch(checkpoint, limited, arguments.rounds, root)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    cases = ["cold", "warm", "fetch", "modules", "imports", "gpu", "broadcast", "exchange", "scale", "all"]
    parser.add_argument("case", nargs="?", choices=cases, default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--size-mb", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=9, help="of the transformer for modules; 9 are 1.19 GB")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[64, 256, 1024], help="of scale")
    parser.add_argument("--cold", action="store_true", help="modules: from the disk, not from the page cache")
    parser.add_argument("--only", nargs="+", help="some of the tables of modules or gpu, by their names")
    parser.add_argument("--directory", type=Path, help="a disk for files and caches (default: the temporary directory)")
    parser.add_argument(
        "--report", type=Path, help="a directory for tables (.md), charts (.svg) and raw values (.json)"
    )
    arguments = parser.parse_args()
    if arguments.case == "gpu" and not torch.accelerator.is_available():
        parser.error("gpu: torch sees no accelerator here")
    return arguments


if __name__ == "__main__":
    arguments = _parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for table in _tables(arguments, Path(directory)):
            table.show(arguments.report)
