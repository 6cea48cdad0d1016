"""A name service that is slow to say what a rank's address is called: torch's store asks it at every connection."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from harness import mounts
from harness.namespace import namespace

pytestmark = [
    pytest.mark.fault(85),
    pytest.mark.skipif(mounts.why_not() is not None, reason="needs root and namespaces"),
]

#: Three ranks in a network of their own, with a name service that knows no name and counts who asks.
_JOB = """
import os, socket, sys, threading
import torch.distributed
import rankload, rankload._api.state_dict

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
asked = 0

def answer():
    global asked
    while True:
        query, client = server.recvfrom(512)
        asked += 1
        no_such_name = b"\\x81\\x83" + query[4:6] + bytes(6)
        server.sendto(query[:2] + no_such_name + query[12:], client)

ranks = []
for rank in range(3):
    if (pid := os.fork()) == 0:
        server.close()
        place = dict(RANK=rank, WORLD_SIZE=3, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=3, MASTER_PORT=29500)
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os._exit(0 if rankload.dist_fetch(sys.argv[1]) else 1)
    ranks.append(pid)
threading.Thread(target=answer, daemon=True).start()
print("exit codes:", *(os.waitpid(pid, 0)[1] for pid in ranks))
print("asked:", asked)
"""


def _run(tmp_path: Path, hosts: dict[str, str]) -> tuple[str, int]:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    (tmp_path / "job.py").write_text(_JOB)
    (tmp_path / "file.bin").write_bytes(b"x")
    inside = (
        f"for name in resolv nsswitch; do mount --bind {tmp_path}/$name.conf /etc/$name.conf; done; "
        'exec "$PYTHON" "$0" "$1"'
    )
    with namespace(hosts) as network:
        words = ["unshare", "--mount", "sh", "-euc", inside, tmp_path / "job.py", tmp_path / "file.bin"]
        done = network.run_program(words, 120, env={"PYTHON": sys.executable}).check()
    codes, asked = re.fullmatch(r"exit codes: (.*)\nasked: (\d+)\n", done.stdout).groups()
    return codes, int(asked)


def test_every_connection_asks_for_a_name_and_the_call_succeeds(tmp_path: Path) -> None:
    codes, asked = _run(tmp_path, {})
    assert codes == "0 0 0"
    assert asked >= 3


def test_entries_for_mapped_addresses_in_etc_hosts_are_the_cure(tmp_path: Path) -> None:
    assert _run(tmp_path, {"node1": "::ffff:127.0.0.1"}) == ("0 0 0", 0)
