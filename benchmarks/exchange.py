"""One file from an origin outside into the caches of four nodes that share no directory.

The nodes are network namespaces with links that are shaped by tc, two ranks on each. ``egress``: what leaves the origin
is limited, for all nodes together. ``ingress``: what each node gets from outside is limited. ``fast origin``: the
network between the nodes is the slower one. Seconds are the slowest rank's, and are compared with the time that the
bytes take over the limited link at best. Needs root and nginx.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.bounds import Bound
from benchmarks.table import Table
from cluster.lab import Lab
from cluster.wait import wait_until

NODES, RANKS_PER_NODE = 4, 2
_MB = 1_000_000
_PORT, _ORIGIN_PORT = 29_500, 8080  # of network namespaces that nobody else is in

_FLOOR = "the limited link alone"
_AUTO = "rankload"
_ONCE = 'rankload, scope="exchange": the origin serves the file once in any case'
_ALONE = 'rankload, scope="node": each node for itself'
_SCOPES = {_AUTO: "auto", _ONCE: "exchange", _ALONE: "node"}

_NGINX = """
worker_processes 1; daemon off; error_log stderr warn; pid {run}/nginx.pid;
events {{ }}
http {{ access_log off; sendfile on; client_body_temp_path {run}/body; proxy_temp_path {run}/proxy;
  fastcgi_temp_path {run}/f; uwsgi_temp_path {run}/u; scgi_temp_path {run}/s;
  server {{ listen 10.77.2.2:{port}; root {run}; }} }}
"""


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        name: of the table.
        origin_mbit: limit on what leaves the origin, in Mbit/s; None for none.
        node_mbit: limit on what each node gets from outside.
        between_mbit: limit on what leaves each node towards the others.
        floor_seconds: least time for so many megabytes.
        bounds: what is promised.
    """

    name: str
    origin_mbit: int | None
    node_mbit: int | None
    between_mbit: int
    bounds: tuple[Bound, ...] = ()

    def floor_seconds(self, size_mb: int) -> float:
        """Return the least time that any way could take."""
        limits = [self.origin_mbit or 1 << 30, NODES * self.node_mbit if self.node_mbit else 1 << 30]
        return size_mb * 8 / min(limits)


CASES = (
    Case("exchange-egress", 400, None, 4000, (Bound(_AUTO, _FLOOR, at_most=1.15),)),
    Case("exchange-ingress", None, 100, 4000, (Bound(_AUTO, _FLOOR, at_most=1.25),)),
    Case("exchange-fast-origin", 4000, None, 400, (Bound(_AUTO, _ALONE, at_most=1.0),)),
)


def exchange(size_mb: int, rounds: int) -> Iterator[Table]:
    """Measure all cases."""
    for case in CASES:
        lab = Lab(NODES)
        try:
            with lab:
                table = _measured(case, lab, size_mb, rounds)
        finally:
            lab.remove_files()
        yield table


def _measured(case: Case, lab: Lab, size_mb: int, rounds: int) -> Table:
    if case.origin_mbit:
        lab.limit("hub", "wan0", f"{case.origin_mbit}mbit")
    for node in lab.nodes:
        lab.limit(node, "mg0", f"{case.between_mbit}mbit")
        if case.node_mbit:
            lab.limit("head", f"{node}-wan", f"{case.node_mbit}mbit")
    (lab.shared / "nginx.conf").write_text(_NGINX.format(run=lab.shared, port=_ORIGIN_PORT))
    (lab.shared / "file.bin").write_bytes(os.urandom(_MB) * size_mb)
    server = lab.start("hub", "nginx", "-e", "stderr", "-c", lab.shared / "nginx.conf")
    try:
        probe = ("python3", "-c", f"import socket; socket.create_connection(('hub-wan', {_ORIGIN_PORT})).close()")
        wait_until(lambda: _succeeds(lab, probe), 20, lambda: "nginx does not start")
        results, notes = _run(lab, f"http://hub-wan:{_ORIGIN_PORT}/file.bin", size_mb, rounds)
    finally:
        server.terminate()
        server.wait(timeout=10)
    floor = case.floor_seconds(size_mb)
    size = f"{NODES} nodes × {RANKS_PER_NODE} ranks, {size_mb / 1000:.3g} GB"
    title = f"{case.name}, {size}, medians of {rounds}, slowest rank"
    shown = {
        way: f"{statistics.median(seconds) / floor:.2f} x the floor; {notes[way]}" for way, seconds in results.items()
    }
    return Table(case.name, title, {_FLOOR: [floor] * rounds, **results}, shown, case.bounds)


def _succeeds(lab: Lab, command: tuple[str, ...]) -> bool:
    try:
        lab.run("node1", *command)
    except AssertionError:
        return False
    return True


def _run(lab: Lab, url: str, size_mb: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    python_path = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)  # a node starts elsewhere
    results: dict[str, list[float]] = defaultdict(list)
    outside: dict[str, list[float]] = defaultdict(list)
    between: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for way, scope in _SCOPES.items():
            before = [[lab.received_bytes(node, network) for node in lab.nodes] for network in ("wan0", "mg0")]
            ranks: list[subprocess.Popen[str]] = []
            for rank in range(NODES * RANKS_PER_NODE):
                node = lab.nodes[rank // RANKS_PER_NODE]
                variables = {"RANK": rank, "WORLD_SIZE": NODES * RANKS_PER_NODE}
                variables |= {"LOCAL_RANK": rank % RANKS_PER_NODE, "LOCAL_WORLD_SIZE": RANKS_PER_NODE}
                variables |= {"MASTER_ADDR": lab.nodes[0], "MASTER_PORT": _PORT, "PYTHONPATH": python_path}
                environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
                directory = lab.scratch / f"{number}-{scope}"
                command = (sys.executable, "-m", "benchmarks.exchange", url, scope, directory)
                ranks.append(lab.start(node, *command, env=environment, stdout=subprocess.PIPE))
            outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
            if any(rank.returncode for rank in ranks):
                raise SystemExit("a rank of the exchange benchmark has failed")
            results[way].append(json.loads(outputs[0].splitlines()[-1]))
            now = [[lab.received_bytes(node, network) for node in lab.nodes] for network in ("wan0", "mg0")]
            gained = [[after - was for after, was in zip(*pair, strict=True)] for pair in zip(now, before, strict=True)]
            outside[way].append(sum(gained[0]) / _MB / size_mb)
            between[way].append(max(gained[1]) / _MB / size_mb)
            for node in lab.nodes:
                lab.run(node, "rm", "-r", directory)
    return results, {
        way: f"{statistics.median(outside[way]):.2f} files from outside, a node gets at most "
        f"{statistics.median(between[way]):.2f} of it from others (with headers)"
        for way in results
    }


# --- in a rank --------------------------------------------------------------------------------------------------------


def _rank(url: str, scope: str, directory: str) -> None:
    """Fetch the file; rank 0 prints the slowest rank's seconds."""
    import rankload._fetch.exchange.peers
    import rankload._fetch.miss  # noqa: F401  # what a miss imports, before the clock starts
    from rankload import dist_fetch

    torch.set_num_threads(1)  # as torchrun does
    dist.init_process_group("gloo")
    dist.barrier()
    began_at = time.perf_counter()
    path = dist_fetch(url, directory, scope=scope, progress=False)  # type: ignore[arg-type]
    seconds = torch.tensor(time.perf_counter() - began_at)
    assert path.is_file()
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps(seconds.item()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(*sys.argv[1:4])
