"""A node loses power in the middle of a download: rank 0's, or one of those that exchange a file."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.lab import Lab
from cluster.origin import Origin
from cluster.slurm import Job, Slurm
from cluster.templates import ALL_RANKS, TRAIN, assert_trained, ranks_in, settings
from cluster.wait import wait_until
from rankload._fetch.exchange.plan import count_units, units_within

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

UNIT_BYTES = 64 * 1024
SURVIVORS = [rank for rank, node in ALL_RANKS.items() if node != "node1"]


@pytest.mark.fault(43)
@pytest.mark.timeout(400)
def test_job_whose_first_node_dies_fails_everywhere_and_its_requeue_succeeds(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url = origin.publish(weights, "node-death")
    slow_url = f"{url}?rate={weights.stat().st_size // 5}"
    variables = {**settings(slow_url, project / "cache"), "RANKLOAD_LIVENESS_SECONDS": "15"}
    job = slurm.sbatch(project, "slurm/train_srun.sbatch", *TRAIN, **variables)
    wait_until(lambda: origin.requests(url), 60, lambda: f"no rank asked for the weights:\n{job.output()}")
    assert origin.clients(url) == ["10.77.2.11"], "rank 0 leads, on node1"

    lab.kill_node("node1")

    wait_until(lambda: len(errors(job)) == len(SURVIVORS), 45, lambda: f"some survivors wait on:\n{job.output()}")
    for rank, error in errors(job).items():
        assert "node1" in error, f"rank {rank} does not say which node is gone: {error}"

    lab.start_node("node1")

    output = job.succeeded(150)
    assert job.field("Restarts") == "1"
    assert ranks_in(output) == ALL_RANKS
    assert_trained(project / "trained.pth", weights)
    assert origin.clients(url) == ["10.77.2.11", "10.77.2.11"]


#: Prints the ranges of bytes that a node's partial files hold.
SPANS = """
import sys
from pathlib import Path
from rankload._fetch.partials.journal import read_journal
for path in Path(sys.argv[1]).glob("*.partial"):
    for begin, end in read_journal(path).spans:
        print(begin, end)
"""


@pytest.mark.fault(92)
@pytest.mark.timeout(400)
def test_node_dies_in_an_exchange_and_the_next_job_fetches_what_no_node_has(
    lab: Lab, slurm: Slurm, origin: Origin, project: Path, weights: Path
) -> None:
    url, model_dir, size = origin.publish(weights, "exchange-death"), lab.scratch / "death", weights.stat().st_size
    path, survivors = model_dir / url.rpartition("/")[2], ["node1", "node2", "node4"]
    served, units = origin.directory / path.name, set(range(count_units(size, UNIT_BYTES)))
    # Each node fetches its quarter in ten seconds. Survivors fetch more until they know that one is lost.
    limits = {"RANKLOAD_CHUNK_BYTES": str(UNIT_BYTES), "RANKLOAD_STREAMS": "1", "RANKLOAD_LIVENESS_SECONDS": "10"}
    variables = {**settings(f"{url}?rate={size // 40}", model_dir), **limits}
    received = lab.received_bytes("node3")
    job = slurm.sbatch(project, "slurm/node_local.sbatch", *TRAIN, **variables)
    wait_until(lambda: lab.received_bytes("node3") > received + size // 10, 60, job.output)

    lab.kill_node("node3")

    others = [rank for rank, node in ALL_RANKS.items() if node in survivors]
    wait_until(lambda: len(errors(job, others)) == len(others), 45, lambda: f"some survivors wait on:\n{job.output()}")
    assert all("node3" in error for error in errors(job, others).values()), errors(job, others)
    lab.start_node("node3")
    slurm.wait_until_idle()  # until then, a survivor may be in the middle of a request
    held: set[int] = set()
    for node in survivors:
        spans = lab.run(node, sys.executable, "-c", SPANS, model_dir).splitlines()
        held |= units_within([tuple(map(int, span.split())) for span in spans], size, UNIT_BYTES)
        if lab.run(node, "sh", "-c", f"ls {path} 2>/dev/null || true"):  # it got the rest in time
            lab.run(node, "cmp", path, served)
            held |= units
    missing = sum(min(UNIT_BYTES, size - unit * UNIT_BYTES) for unit in units - held)
    assert missing < size

    next_job_at = time.monotonic()
    job = slurm.sbatch(project, "slurm/node_local.sbatch", *TRAIN, **variables)

    assert ranks_in(job.succeeded(150)) == ALL_RANKS
    assert_trained(project / "trained.pth", weights)
    for node in lab.nodes:
        lab.run(node, "cmp", path, served)
    assert (
        origin.body_bytes(url, begun_after=next_job_at) <= missing + 4
    )  # a byte for each node that asks for the version


def errors(job: Job, ranks: Iterable[int] = SURVIVORS) -> dict[int, str]:
    """The last line of the traceback on each rank that ended with an error of rankload's."""
    found = {}
    for rank in ranks:
        if raised := re.findall(r"rankload\.\S*Error: .*", job.rank_output(rank), re.MULTILINE):
            found[rank] = raised[-1]
    return found
