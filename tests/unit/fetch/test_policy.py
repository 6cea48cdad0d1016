"""What to do about a request, given what lies in the cache: the whole table."""

import os
from pathlib import Path

import pytest

from rankload._cache.record import Record
from rankload._fetch.models import FetchRequest
from rankload._fetch.policy import Action, Cached, after_check, decide, known_digest, may_publish
from rankload._urls import Url, url_key

URL, MIRROR, STRANGER = "http://a.example/m.pth", "http://b.example/m.pth", "http://c.example/m.pth"
SHA, OTHER = "ab" * 32, "cd" * 32


def status(size=100, mtime_ns=5, inode=7):
    fields = list(range(10))
    fields[1], fields[6] = inode, size
    return os.stat_result((*fields, *(0.0,) * 3, 0, mtime_ns, 0, *(0,) * 3))


def record(url=URL, sha256=SHA, size_bytes=100, mtime_ns=5, inode=7, vouched_by=None):
    return Record(url, url_key(url), size_bytes, mtime_ns, inode, None, sha256, vouched_by, "download")


def request(**arguments):
    return FetchRequest((Url.parse(URL), Url.parse(MIRROR)), Path("/cache"), "m.pth", **arguments)


USE, CHECK, DOWNLOAD, REPLACE = Action.USE, Action.CHECK, Action.DOWNLOAD, Action.REPLACE
SEPARATE, ASK = Action.SEPARATE, Action.ASK

TABLE = [
    # the request, the file's status, its record, what to do, a word of the reason
    (request(), None, None, DOWNLOAD, "not cached"),
    (request(), None, record(), DOWNLOAD, "not cached"),
    (request(), status(size=0), None, SEPARATE, "empty"),
    (request(), status(size=0), record(), DOWNLOAD, "empty"),
    (request(), status(size=0), record(STRANGER), SEPARATE, STRANGER),
    (request(), status(), None, CHECK, "torch.hub"),
    (request(verify="never"), status(), None, CHECK, "torch.hub"),
    # whose file it is
    (request(), status(), record(STRANGER), SEPARATE, STRANGER),
    (request(), status(size=0), record(STRANGER), SEPARATE, STRANGER),
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
    (request(sha256=SHA), status(), record(sha256=None), CHECK, "has not been hashed"),
    (request(hash_prefix="abab"), status(), record(sha256=None), CHECK, "has not been hashed"),
    # changed since
    (request(), status(size=99), record(), REPLACE, "99 bytes, not 100"),
    (request(verify="never"), status(size=99), record(), REPLACE, "99 bytes, not 100"),
    (request(), status(mtime_ns=6), record(), CHECK, "touched or copied"),
    (request(), status(inode=8), record(), CHECK, "touched or copied"),
    (request(sha256=OTHER), status(inode=8), record(), CHECK, "touched or copied"),
    # verify
    (request(verify="always"), status(), record(), CHECK, "always"),
    (request(sidecar=True), None, None, DOWNLOAD, "not cached"),
    (request(sidecar=True), status(), None, ASK, "sidecar"),
    (request(sidecar=True), status(), record(), ASK, "not been compared"),
    (request(sidecar=True), status(), record(vouched_by="sidecar"), USE, "vouches"),
    (request(sidecar=True, sha256=SHA), status(), record(), USE, "vouches"),
    (request(sidecar=True, sha256=SHA, sha256_source="sidecar"), status(), record(), CHECK, "from now on"),
    (request(sidecar=True, sha256=OTHER, sha256_source="sidecar"), status(), record(), CHECK, "from now on"),
    (request(verify="never"), status(mtime_ns=6), record(), USE, "never"),
    (request(verify="never", sha256=OTHER), status(), record(), DOWNLOAD, "another one is expected"),
    (request(verify="never", sha256=SHA), status(), record(sha256=None), USE, "never"),
]


@pytest.mark.parametrize(("asked", "file", "known", "action", "reason"), TABLE)
def test_table(asked, file, known, action, reason):
    plan = decide(asked, Cached(file, known, is_replaceable=known is not None))
    assert plan.action is action, plan
    assert reason in plan.reason


@pytest.mark.parametrize(("asked", "file", "known", "action", "reason"), TABLE)
def test_nothing_is_replaced_that_rankload_did_not_publish(asked, file, known, action, reason):
    plan = decide(asked, Cached(file, known, is_replaceable=False))
    is_replacing = action in (DOWNLOAD, REPLACE) and file is not None
    assert plan.action is (SEPARATE if is_replacing else action)
    assert reason in plan.reason


@pytest.mark.parametrize("is_of_one_url", [True, False])
@pytest.mark.parametrize(("asked", "file", "known", "action", "reason"), TABLE)
def test_what_is_downloaded_may_be_published(asked, file, known, action, reason, is_of_one_url):
    """Otherwise it would be downloaded again, and again."""
    cached = Cached(file, known, is_replaceable=known is not None, is_of_one_url=is_of_one_url)
    if decide(asked, cached).action in (DOWNLOAD, REPLACE):
        assert may_publish(asked, cached)


@pytest.mark.parametrize("verify", ["once", "always", "never"])
@pytest.mark.parametrize("digest", [{"sha256": SHA}, {"sha256": OTHER}, {"hash_prefix": "abab"}])
def test_what_another_user_wrote_is_hashed_against_the_callers_digest(verify, digest):
    plan = decide(request(verify=verify, **digest), Cached(status(), record(), is_trusted=False))
    assert plan.action is CHECK


@pytest.mark.parametrize("is_replaceable", [True, False])
@pytest.mark.parametrize(("asked", "action"), [(request(), SEPARATE), (request(sha256=SHA), CHECK)])
def test_file_whose_record_cannot_be_read_is_somebodys(asked, action, is_replaceable):
    plan = decide(asked, Cached(status(), None, "unreadable", is_replaceable=is_replaceable))
    assert (plan.action, plan.reason) == (action, "unreadable")


@pytest.mark.parametrize("is_damaged", [True, False])
def test_after_a_check_that_failed(is_damaged):
    mine, others = (Cached(status(), record(), is_replaceable=is_mine) for is_mine in (True, False))
    assert after_check(mine, is_damaged=is_damaged, reason="bad").action is (REPLACE if is_damaged else DOWNLOAD)
    assert after_check(others, is_damaged=is_damaged, reason="bad").action is SEPARATE


@pytest.mark.parametrize(
    ("cached", "is_free"),
    [
        (Cached(None, None), True),
        (Cached(None, record(STRANGER)), True),
        (Cached(None, None, "unreadable"), True),
        (Cached(status(), record(), is_replaceable=True), True),
        (Cached(status(), record(MIRROR), is_replaceable=True), True),
        (Cached(status(), record(), is_replaceable=False), False),
        (Cached(status(), record(STRANGER), is_replaceable=True), False),
        (Cached(status(), None), False),
        (Cached(status(), None, "unreadable"), False),
        (Cached(status(size=0), None), False),
    ],
)
def test_where_a_download_may_be_published(cached, is_free):
    assert may_publish(request(), cached) is is_free


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
