"""Twenty jobs of one rank at once on a cold cache, some of them killed or frozen and woken at random moments.

PYTHONPATH=tests:src python -m soak.many_jobs --runs 20 --seed 1
"""

from __future__ import annotations

import hashlib
import random
import signal
import time
from pathlib import Path

from harness.origin import Origin
from harness.ranks import RankGroup, run_ranks, start_ranks
from soak.cache import assert_clean, assert_published_is
from soak.jobs import fetch_digest
from soak.runs import start

NAME = "model.bin"
JOBS = 20

ENVIRONMENT = {
    "RANKLOAD_STREAMS": "4",
    "RANKLOAD_CHUNK_BYTES": str(256 << 10),
    "RANKLOAD_LEASE_SECONDS": "1.5",
    "RANKLOAD_PROGRESS_SECONDS": "20",
}


def run(source: random.Random, directory: Path) -> tuple[str, str]:
    """Whoever lives has the right file in the end, and after one more job nothing is left over."""
    content = source.randbytes(source.randint(2 << 20, 6 << 20))
    digest, cache = hashlib.sha256(content).hexdigest(), directory / "cache"
    with Origin() as origin:
        url = origin.add(NAME, content, bytes_per_second=1 << 20)
        arguments = {"env": "none", "args": (url, str(cache)), "rank_env": lambda rank: ENVIRONMENT}
        with start_ranks(fetch_digest, JOBS, **arguments) as jobs:
            origin.wait_for_requests(NAME, 1)
            killed, frozen = disturb(source, jobs)
            results = jobs.wait(90)
        for result in results:
            if result.exitcode == 0:
                assert result.value == digest
            else:
                assert result.rank in killed and result.exitcode == -9, result.describe()
        assert_published_is(cache / NAME, content)
        sent_bytes = origin.bytes_sent(NAME)
        [last] = run_ranks(fetch_digest, 1, 60, **arguments)
        assert last.value == digest
    assert_clean(cache, NAME)
    copies = sent_bytes / len(content)
    return f"{len(killed)} killed, {len(frozen)} frozen, {copies:.2f} times the file was sent", "right"


def disturb(source: random.Random, jobs: RankGroup) -> tuple[set[int], set[int]]:
    """Kills some, freezes others for up to twice the lease; half the time whoever is downloading right now."""
    killed, frozen, asleep = set[int](), set[int](), dict[int, float]()
    for _ in range(source.randint(0, 10)):
        time.sleep(source.uniform(0, 0.4))
        for rank in [rank for rank, until in asleep.items() if until < time.monotonic()]:
            jobs.cont(rank)
            del asleep[rank]
        alive = [rank for rank in range(JOBS) if jobs.is_alive(rank) and rank not in killed | asleep.keys()]
        if not alive:
            break
        leaders = [rank for rank in alive if "Downloading" in jobs.stderr(rank)]
        victim = source.choice(leaders if leaders and source.random() < 0.5 else alive)
        if source.random() < 0.5:
            jobs.kill(victim)
            killed.add(victim)
        else:
            jobs.kill(victim, signal.SIGSTOP)  # not waited for: it may have ended just now
            asleep[victim] = time.monotonic() + source.uniform(0, 3)
            frozen.add(victim)
    while asleep:
        rank, until = asleep.popitem()
        time.sleep(max(0.0, until - time.monotonic()))
        jobs.cont(rank)
    return killed, frozen


if __name__ == "__main__":
    start("many_jobs", run)
