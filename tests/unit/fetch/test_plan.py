"""What to do about a request, given what lies in the cache: the whole table."""

import os
from pathlib import Path

import pytest

from rankload._cache.record import Record
from rankload._fetch.plan import Action, Cached, decide, known_digest
from rankload._types import FetchRequest
from rankload._urls import url_key

URL, MIRROR, STRANGER = "http://a.example/m.pth", "http://b.example/m.pth", "http://c.example/m.pth"
SHA, OTHER = "ab" * 32, "cd" * 32


def status(size=100, mtime_ns=5, inode=7):
    fields = list(range(10))
    fields[1], fields[6] = inode, size
    return os.stat_result((*fields, *(0.0,) * 3, 0, mtime_ns, 0, *(0,) * 3))


def record(url=URL, sha256=SHA, size_bytes=100, mtime_ns=5, inode=7, vouched_by=None):
    return Record(url, url_key(url), size_bytes, mtime_ns, inode, None, sha256, vouched_by, "download")


def request(**arguments):
    return FetchRequest((URL, MIRROR), Path("/cache"), "m.pth", **arguments)


USE, CHECK, DOWNLOAD, REPLACE = Action.USE, Action.CHECK, Action.DOWNLOAD, Action.REPLACE
SEPARATE, ASK = Action.SEPARATE, Action.ASK

TABLE = [
    # the request, the file's status, its record, what to do, a word of the reason
    (request(), None, None, DOWNLOAD, "not cached"),
    (request(), None, record(), DOWNLOAD, "not cached"),
    (request(), status(size=0), None, DOWNLOAD, "empty"),
    (request(), status(size=0), record(), DOWNLOAD, "empty"),
    (request(), status(), None, CHECK, "torch.hub"),
    (request(verify="never"), status(), None, CHECK, "torch.hub"),
    # whose file it is
    (request(), status(), record(STRANGER), SEPARATE, STRANGER),
    (request(sha256=OTHER), status(), record(STRANGER), SEPARATE, STRANGER),
    (request(sha256=SHA), status(), record(STRANGER), USE, "vouches"),
    (request(), status(), record(MIRROR), USE, "vouches"),
    (request(verify="never"), status(), record(STRANGER), SEPARATE, STRANGER),
    # as it was published
    (request(), status(), record(), USE, "vouches"),
    (request(sha256=SHA), status(), record(), USE, "vouches"),
    (request(hash_prefix="abab"), status(), record(), USE, "vouches"),
    (request(sha256=OTHER), status(), record(), DOWNLOAD, "another one is expected"),
    (request(hash_prefix="cdcd"), status(), record(), DOWNLOAD, "another one is expected"),
    # adopted without a digest
    (request(), status(), record(sha256=None), USE, "vouches"),
    (request(sha256=SHA), status(), record(sha256=None), CHECK, "nobody has hashed"),
    (request(hash_prefix="abab"), status(), record(sha256=None), CHECK, "nobody has hashed"),
    # changed since
    (request(), status(size=99), record(), REPLACE, "99 bytes, not 100"),
    (request(verify="never"), status(size=99), record(), REPLACE, "99 bytes, not 100"),
    (request(), status(mtime_ns=6), record(), CHECK, "touched or copied"),
    (request(), status(inode=8), record(), CHECK, "touched or copied"),
    (request(sha256=OTHER), status(inode=8), record(), CHECK, "touched or copied"),
    # verify
    (request(verify="always"), status(), record(), CHECK, "always"),
    (request(verify="sidecar"), None, None, DOWNLOAD, "not cached"),
    (request(verify="sidecar"), status(), None, ASK, "sidecar"),
    (request(verify="sidecar"), status(), record(), ASK, "not yet compared"),
    (request(verify="sidecar"), status(), record(vouched_by="sidecar"), USE, "vouches"),
    (request(verify="sidecar", sha256=SHA), status(), record(), USE, "vouches"),
    (request(verify="sidecar", sha256=SHA, sha256_source="sidecar"), status(), record(), CHECK, "from now on"),
    (request(verify="sidecar", sha256=OTHER, sha256_source="sidecar"), status(), record(), CHECK, "from now on"),
    (request(verify="never"), status(mtime_ns=6), record(), USE, "never"),
    (request(verify="never", sha256=OTHER), status(), record(), DOWNLOAD, "another one is expected"),
    (request(verify="never", sha256=SHA), status(), record(sha256=None), USE, "never"),
]


@pytest.mark.parametrize(("asked", "file", "known", "action", "reason"), TABLE)
def test_table(asked, file, known, action, reason):
    plan = decide(asked, Cached(file, known))
    assert plan.action is action, plan
    assert reason in plan.reason


@pytest.mark.parametrize(
    ("asked", "known", "expected"),
    [
        (request(), None, None),
        (request(hash_prefix="abab"), None, "abab"),
        (request(hash_prefix="abab"), record(), SHA),
        (request(sha256=OTHER, hash_prefix="abab"), record(), OTHER),
        (request(), record(sha256=None), None),
    ],
)
def test_strongest_known_digest(asked, known, expected):
    assert known_digest(asked, Cached(status(), known)) == expected
