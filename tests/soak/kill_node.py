"""A node is killed at a random moment while nodes with their own caches exchange a file; the next job fetches the rest.

PYTHONPATH=tests:src python -m soak.kill_node --runs 100 --seed 1
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from harness.origin import Origin
from harness.ranks import run_ranks, start_ranks
from rankload._fetch.exchange.plan import count_units, units_within
from rankload._fetch.partials.journal import read_journal
from soak.cache import assert_published_is
from soak.jobs import fetch_on_node
from soak.kill_leader import ENVIRONMENT, assert_right_or_lost
from soak.runs import start

NAME = "model.bin"
NODES, RANKS_PER_NODE = 4, 2
UNIT_BYTES = 64 << 10
BYTES_PER_SECOND = 64 << 10, 512 << 10  # of each connection


def run(source: random.Random, directory: Path) -> tuple[str, str]:
    """A job of eight ranks loses a node; nothing wrong is published, and the next job fetches what no node has."""
    content = source.randbytes(source.randint(1 << 20, 4 << 20))
    digest, victim = hashlib.sha256(content).hexdigest(), source.randrange(NODES)
    with Origin() as origin:
        url = origin.add(NAME, content, bytes_per_second=source.choice(BYTES_PER_SECOND))
        environment = {**ENVIRONMENT, "RANKLOAD_CHUNK_BYTES": str(UNIT_BYTES)}
        options = {"nodes": NODES, "args": (url, str(directory), RANKS_PER_NODE), "rank_env": lambda rank: environment}
        with start_ranks(fetch_on_node, NODES * RANKS_PER_NODE, **options) as job:
            origin.wait_until_sent(NAME, sent_bytes := source.randrange(len(content)))
            time.sleep(source.choice([0, source.uniform(0, 0.05), source.uniform(0, 0.5)]))  # at any moment
            killed = [rank for rank in range(NODES * RANKS_PER_NODE) if rank // RANKS_PER_NODE == victim]
            for rank in killed:
                job.kill(rank)
            results = job.wait(60)
        for rank, result in enumerate(results):
            assert_right_or_lost(result, digest, may_be_killed=rank in killed)
        ended = {result.exitcode == 0 for rank, result in enumerate(results) if rank not in killed}
        assert len(ended) == 1, "not one outcome"
        if is_replaced := source.random() < 0.5:
            shutil.rmtree(directory / f"node{victim}", ignore_errors=True)  # another node takes its place
        was_published = [assert_published_is(path, content) for path in paths(directory)]
        missing_bytes = 0 if any(was_published) else missing(directory, len(content))
        origin.wait_until_idle()
        sent_before = origin.bytes_sent(NAME)
        origin.add(NAME, content)
        for result in run_ranks(fetch_on_node, NODES * RANKS_PER_NODE, 60, **options):
            assert result.value == digest
        fetched_bytes = origin.bytes_sent(NAME) - sent_before
    assert fetched_bytes <= missing_bytes + NODES, f"{fetched_bytes} bytes fetched, {missing_bytes} were missing"
    assert all(assert_published_is(path, content) for path in paths(directory))
    what = f"{sent_bytes} of {len(content)} bytes sent, then {fetched_bytes} more, {is_replaced=}"
    return what, "published before" if any(was_published) else "resumed" if missing_bytes < len(content) else "anew"


def paths(directory: Path) -> list[Path]:
    return [directory / f"node{node}" / NAME for node in range(NODES)]


def missing(directory: Path, size_bytes: int) -> int:
    """Return how many bytes are in units that no node has, by the journals of the partial files."""
    held: set[int] = set()
    for path in directory.glob("node*/*.partial"):
        journal = read_journal(path)
        spans: Iterable[tuple[int, int]] = journal.spans if journal is not None else ()
        held |= units_within(spans, size_bytes, UNIT_BYTES)
    units = set(range(count_units(size_bytes, UNIT_BYTES)))
    return sum(min(UNIT_BYTES, size_bytes - unit * UNIT_BYTES) for unit in units - held)


if __name__ == "__main__":
    start("kill_node", run)
