"""Many jobs at once on one cold cache, on filesystems that lock well, badly, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest

from harness import fuse
from harness.fetch_calls import fetch, files_in
from harness.rank import mark_and_wait
from harness.ranks import start_ranks

#: Of the simplest cases; what a filesystem does to a lease shows with fewer.
JOBS, FEWER_JOBS = 20, 8
MIB = 1 << 20
NAME = "file.bin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not())),
]


def digest_of_file(rank, url, caches):
    """One of the jobs; every second one is on the second node."""
    import rankload._api.state_dict  # noqa: F401 - so that all begin together

    mark_and_wait("ready")
    return hashlib.sha256(Path(fetch(rank, url, caches[rank % len(caches)])).read_bytes()).hexdigest()


@pytest.mark.fault(31)
@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("nodes", "vices", "job_count", "most_downloads"),
    [
        (1, {}, FEWER_JOBS, 1),
        (2, {}, JOBS, 1),
        (2, {"locks": "local"}, FEWER_JOBS, 1),  # the lease needs no lock
        # an exclusive open excludes nobody on the other node
        (2, {"locks": "local", "lag_seconds": 20}, FEWER_JOBS, FEWER_JOBS),
        (2, {"locks": "ENOLCK"}, FEWER_JOBS, 1),
        (
            2,
            {"locks": "local", "negative_seconds": 1, "attribute_seconds": 1, "entry_seconds": 1},
            FEWER_JOBS,
            FEWER_JOBS,
        ),
        (2, {"planted_lease": "nowhere"}, FEWER_JOBS, FEWER_JOBS),  # no lease at all
    ],
    ids=str,
)
def test_many_jobs_at_once(origin, tmp_path, big_content, monkeypatch, nodes, vices, job_count, most_downloads):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")  # every byte that is sent counts below
    url = origin.add(NAME, big_content)
    if target := (vices := dict(vices)).pop("planted_lease", None):
        own = tmp_path / "server" / ".rankload"
        own.mkdir(parents=True)
        (own / f"{NAME}.lease").symlink_to(target)
    with fuse.nodes(tmp_path, nodes, **vices) as mounts, contextlib.ExitStack() as stack:
        paths = [mount.path for mount in mounts]
        jobs = stack.enter_context(start_ranks(digest_of_file, job_count, env="none", args=(url, paths)))
        jobs.wait_for_mark("ready", timeout_seconds=90)
        jobs.open_gate("ready")
        results = jobs.wait(90)
        assert {result.value for result in results} == {hashlib.sha256(big_content).hexdigest()}
    origin.wait_until_idle()
    assert len(big_content) <= origin.bytes_sent() <= most_downloads * len(big_content)
    server = tmp_path / "server"
    assert (server / NAME).read_bytes() == big_content
    assert [name for name in files_in(server) if not name.endswith((".json", ".lease", NAME))] == []
