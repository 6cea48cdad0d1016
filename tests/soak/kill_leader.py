"""The leader of a job is killed at a random moment of its download; the next job goes on where it was.

PYTHONPATH=tests:src python -m soak.kill_leader --runs 100 --seed 1
"""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

from harness.origin import Origin
from harness.ranks import RankResult, run_ranks, start_ranks
from soak.cache import assert_clean, assert_published_is
from soak.jobs import fetch_digest
from soak.runs import start

NAME = "model.bin"
STREAMS, CHUNK_BYTES = 4, 1 << 20
BYTES_PER_SECOND = 16 << 20  # of each connection

#: Sent, but not yet read, when the leader died: what the origin hands to the kernel in one go, on each stream.
IN_FLIGHT_BYTES = STREAMS * (1 << 20)

EXPECTED = ("RankLostError", "StoreLostError", "ArrivalTimeoutError")

ENVIRONMENT = {
    "RANKLOAD_STREAMS": str(STREAMS),
    "RANKLOAD_CHUNK_BYTES": str(CHUNK_BYTES),
    "RANKLOAD_ARRIVAL_SECONDS": "5",  # the leader may die before the other has met it
    "RANKLOAD_LIVENESS_SECONDS": "2",
    "RANKLOAD_HEARTBEAT_SECONDS": "0.2",
    "RANKLOAD_LEASE_SECONDS": "1.5",
}


def run(source: random.Random, directory: Path) -> tuple[str, str]:
    """A job of two ranks loses its leader; what is there is right, and the next job fetches no more than is missing."""
    content = source.randbytes(source.randint(8 << 20, 24 << 20))
    digest, cache = hashlib.sha256(content).hexdigest(), directory / "cache"
    with Origin() as origin:
        url = origin.add(NAME, content, bytes_per_second=BYTES_PER_SECOND)
        arguments = {"args": (url, str(cache)), "rank_env": lambda rank: ENVIRONMENT}
        # a third of the deaths fall behind the last byte: hash, sync, record, rename
        sent_bytes = len(content) if source.random() < 0.33 else source.randrange(len(content))
        with start_ranks(fetch_digest, 2, **arguments) as job:
            origin.wait_until_sent(NAME, sent_bytes)
            time.sleep(source.choice([0, source.uniform(0, 0.005), source.uniform(0, 0.05)]))  # at any moment
            sent_bytes = origin.bytes_sent(NAME)
            job.kill(0)
            leader, other = job.wait()
        assert_right_or_lost(leader, digest, may_be_killed=True)
        assert_right_or_lost(other, digest, may_be_killed=False)
        was_published = assert_published_is(cache / NAME, content)
        origin.wait_until_idle()
        sent_before = origin.bytes_sent(NAME)
        origin.add(NAME, content)
        began_at = time.monotonic()
        for result in run_ranks(fetch_digest, 2, 60, **arguments):
            assert result.value == digest
        seconds = time.monotonic() - began_at
        fetched_bytes = origin.bytes_sent(NAME) - sent_before
    missing_bytes = 0 if was_published else len(content) - sent_bytes
    assert fetched_bytes <= missing_bytes + (0 if was_published else STREAMS * CHUNK_BYTES + IN_FLIGHT_BYTES), (
        f"{fetched_bytes} bytes fetched, {missing_bytes} of {len(content)} were missing"
    )
    assert_clean(cache, NAME, after_a_hit=was_published)
    how = f"{sent_bytes} of {len(content)} bytes sent, then {fetched_bytes} more in {seconds:.1f} s"
    return how, "published before" if was_published else "resumed" if fetched_bytes < len(content) else "from the start"


def assert_right_or_lost(result: RankResult, digest: str, *, may_be_killed: bool) -> None:
    if result.exitcode == 0:
        assert result.value == digest
    elif not (may_be_killed and result.exitcode == -9):
        assert result.exception is not None, result.describe()
        assert result.exception.type_name in EXPECTED, result.describe()


if __name__ == "__main__":
    start("kill_leader", run)
