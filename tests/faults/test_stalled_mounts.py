"""A filesystem that stops answering on one node: the others do not wait for its ranks for ever."""

from __future__ import annotations

import pytest

import rankload
from harness import fuse
from harness.fetch_calls import error_in, fetch, load
from harness.rank import mark_and_wait
from harness.ranks import run_ranks, start_ranks

NAME = "file.bin"
TIMEOUT_SECONDS = 1.0

needs_fuse = pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not()))


def fetch_on_node(rank, url, paths):
    """Fetches over the mount of this rank's node."""
    return fetch(rank, url, paths[rank], scope="job", timeout=TIMEOUT_SECONDS)


def load_on_node(rank, url, paths):
    """Loads over the mount of this rank's node, when the gate opens."""
    mark_and_wait("begins")
    return load(rank, url, paths[rank], scope="job", timeout=TIMEOUT_SECONDS)


@pytest.mark.fault(58)
@needs_fuse
def test_while_the_leader_downloads(origin, tmp_path, big_content):
    """Its own deadline may end its wait, or the other rank's judgement."""
    url = origin.add(NAME, big_content, hold_at=len(big_content) // 2)
    with fuse.nodes(tmp_path, 2) as nodes:
        with start_ranks(fetch_on_node, 2, nodes=2, args=(url, [node.path for node in nodes])) as job:
            origin.wait_until_held(NAME)
            with nodes[0].stalled():
                origin.release(NAME)
                waiting = error_in(job.wait_for_end(1, timeout_seconds=30))
            stuck = error_in(job.wait()[0])
        assert not (tmp_path / "server" / NAME).exists()
    assert isinstance(waiting, TimeoutError) and "rank 0" in str(waiting)
    assert str(stuck) == str(waiting)


@pytest.mark.fault(58)
@needs_fuse
@pytest.mark.parametrize("stuck_rank", [0, 1])
def test_while_one_rank_opens_the_file(origin, tmp_path, checkpoint, stuck_rank):
    url = origin.add(checkpoint.name, checkpoint.path)
    with fuse.nodes(tmp_path, 2) as nodes:
        paths = [node.path for node in nodes]
        run_ranks(fetch, 1, env="none", args=(url, paths[0]))
        with start_ranks(load_on_node, 2, nodes=2, args=(url, paths)) as job:
            job.wait_for_mark("begins")
            with nodes[stuck_rank].stalled():
                job.open_gate("begins")
                waiting = error_in(job.wait_for_end(1 - stuck_rank, timeout_seconds=30))
            stuck = error_in(job.wait()[stuck_rank])
    assert isinstance(waiting, rankload.errors.ProgressTimeoutError)
    assert waiting.stuck_rank == stuck_rank and f"rank {stuck_rank} " in str(waiting)
    assert str(stuck) == str(waiting)
