"""Digests that an origin gives: in headers of the answer, on a redirect, in a sidecar file."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest

import rankload
from harness.fetch_calls import errors_of, expect, fetch, files_in, whole_log
from harness.ranks import run_ranks
from harness.replies import Reply
from rankload._fetch.sidecar import fetch_sidecar
from rankload._settings import Settings
from rankload._urls import Url

CONTENT = b"content of a file\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WRONG = "0" * 64
QUARANTINED = [".rankload/quarantine/file.bin", ".rankload/quarantine/file.bin.json"]


def base64_of(sha256):
    return base64.b64encode(bytes.fromhex(sha256)).decode()


def header(name, sha256=SHA256):
    """A header of that name, as servers write it."""
    text = {"Repr-Digest": "sha-256=:%s:", "Digest": "SHA-256=%s", "x-amz-checksum-sha256": "%s"}[name]
    return {name: text % base64_of(sha256)}


def record_in(cache):
    return json.loads((cache / ".rankload/file.bin.json").read_text())


HEADERS = {
    "repr-digest": header("Repr-Digest"),
    "digest": header("Digest"),
    "x-amz-checksum-sha256": header("x-amz-checksum-sha256"),
    "x-linked-etag": {"X-Linked-ETag": f'"{SHA256}"'},
}


@pytest.mark.parametrize("name", HEADERS)
def test_digest_in_a_header_vouches(origin, cache, caplog, name):
    url = origin.add("file.bin", CONTENT, headers=HEADERS[name])
    with whole_log(caplog):
        assert rankload.dist_fetch(url, cache).read_bytes() == CONTENT
    record = record_in(cache)
    assert (record["sha256"], record["vouched_by"]) == (SHA256, name)
    assert f"{url}: {len(CONTENT)} bytes, SHA-256 {SHA256} ({name})" in caplog.text


def test_nobody_vouches(origin, cache, caplog):
    with whole_log(caplog):
        rankload.dist_fetch(origin.add("file.bin", CONTENT), cache)
    assert (record_in(cache)["sha256"], record_in(cache)["vouched_by"]) == (SHA256, None)
    assert f"SHA-256 {SHA256} (no digest to compare with)" in caplog.text


@pytest.mark.fault(18)
@pytest.mark.parametrize("name", ["Repr-Digest", "Digest", "x-amz-checksum-sha256"])
def test_wrong_digest_in_a_header(origin, cache, name):
    url = origin.add("file.bin", CONTENT, headers=header(name, WRONG))
    errors = errors_of(fetch, url, cache)
    expect(errors, rankload.errors.DigestMismatchError, f'expected "{WRONG}", got "{SHA256}"', url, f"({name.lower()})")
    assert files_in(cache) == QUARANTINED
    assert origin.request_count() == 2


def test_wrong_digest_once(origin, cache):
    url = origin.add("file.bin", CONTENT, Reply(headers=header("Repr-Digest", WRONG)), Reply())
    assert rankload.dist_fetch(url, cache).read_bytes() == CONTENT


def test_digest_of_the_whole_holds_for_ranges(origin, cache, big_content, monkeypatch):
    """A Repr-Digest stands in each partial answer, and is of the whole file."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", "1000000")
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    sha256 = hashlib.sha256(big_content).hexdigest()
    url = origin.add("file.bin", big_content, headers=header("Repr-Digest", sha256))
    rankload.dist_fetch(url, cache)
    assert origin.request_count() > 2
    assert record_in(cache)["vouched_by"] == "repr-digest"


def test_digest_tells_versions_apart_where_there_is_no_validator(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", "1000000")
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    sha256 = hashlib.sha256(big_content).hexdigest()
    bare = {"etag": False, "last_modified": None}
    old, new = (Reply(**bare, headers=header("Repr-Digest", one)) for one in (WRONG, sha256))
    url = origin.add("file.bin", big_content, old, new)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert [request.headers.get("range", "").partition("-")[0] for request in origin.requests()].count("bytes=0") == 2


IGNORED = {
    "digest of digests": {"x-amz-checksum-sha256": base64_of(WRONG) + "-3"},
    "composite": {"x-amz-checksum-sha256": base64_of(WRONG), "x-amz-checksum-type": "COMPOSITE"},
    "of this answer's bytes": {"Content-Digest": f"sha-256=:{base64_of(WRONG)}:"},
    "another algorithm": {"Repr-Digest": "sha-512=:AAAA:", "Digest": "md5=AAAA"},
    "nonsense": {"Repr-Digest": "sha-256=:no base64:", "Digest": "SHA-256=short"},
    "an etag that looks like one": {"ETag": f'"{WRONG}"'},
    "an etag of a small file": {"X-Linked-ETag": '"0123456789abcdef0123456789abcdef01234567"'},
}


@pytest.mark.parametrize("kind", IGNORED)
def test_header_that_is_no_digest_of_the_file(origin, cache, kind):
    url = origin.add("file.bin", CONTENT, headers=IGNORED[kind])
    assert rankload.dist_fetch(url, cache).read_bytes() == CONTENT
    assert record_in(cache)["vouched_by"] is None


def test_full_object_checksum_of_s3(origin, cache):
    headers = {**header("x-amz-checksum-sha256"), "x-amz-checksum-type": "FULL_OBJECT"}
    rankload.dist_fetch(origin.add("file.bin", CONTENT, headers=headers), cache)
    assert record_in(cache)["vouched_by"] == "x-amz-checksum-sha256"


@pytest.mark.fault(18)
@pytest.mark.parametrize("sha256", [SHA256, WRONG])
def test_digest_on_a_redirect(origin, cache, sha256):
    """As the Hugging Face Hub gives it, before it leads to where the bytes are."""
    origin.add("blob", CONTENT)
    url = origin.add("file.bin", b"", redirect_to="/blob", headers={"X-Linked-ETag": f'"{sha256}"'})
    if sha256 == SHA256:
        assert rankload.dist_fetch(url, cache).read_bytes() == CONTENT
        assert record_in(cache)["vouched_by"] == "x-linked-etag"
    else:
        expect(errors_of(fetch, url, cache), rankload.errors.DigestMismatchError, url, "(x-linked-etag)")
        assert files_in(cache) == QUARANTINED


def test_digest_of_the_caller_comes_first(origin, cache):
    url = origin.add("file.bin", CONTENT, headers=header("Repr-Digest"))
    rankload.dist_fetch(url, cache, sha256=SHA256)
    assert record_in(cache)["vouched_by"] == "sha256"


@pytest.mark.fault(18)
def test_right_digest_of_the_caller_and_a_wrong_one_of_the_origin(origin, cache):
    """They contradict each other: that is for the user to look at."""
    url = origin.add("file.bin", CONTENT, headers=header("Repr-Digest", WRONG))
    errors = errors_of(fetch, url, cache, sha256=SHA256)
    expect(errors, rankload.errors.DigestMismatchError, "(repr-digest)")


SIDECARS = {
    "digest alone": SHA256,
    "as sha256sum writes it": f"{SHA256}  file.bin\n",
    "binary mode, upper case": f"{SHA256.upper()} *file.bin\n",
    "in a directory": f"{SHA256}  dist/file.bin\n",
    "several files": f"{WRONG}  other.bin\n{SHA256}  file.bin\n{WRONG}  file.bin.txt\n",
    "of BSD": f"SHA256 (file.bin) = {SHA256}\n",
    "another name, but one digest": f"{SHA256}  renamed.bin\n",
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_sidecar_vouches(origin, cache, caplog, kind):
    url = origin.add("file.bin", CONTENT)
    origin.add("file.bin.sha256", SIDECARS[kind].encode())
    with whole_log(caplog):
        assert rankload.dist_fetch(url, cache, sidecar=True).read_bytes() == CONTENT
    assert record_in(cache)["vouched_by"] == "sidecar"
    assert f"SHA-256 {SHA256} (sidecar)" in caplog.text


def test_sidecar_is_asked_for_once(origin, cache):
    url = origin.add("file.bin", CONTENT)
    origin.add("file.bin.sha256", SHA256.encode())
    for _ in range(2):
        results = run_ranks(fetch, 2, args=(url, cache), kwargs={"sidecar": True})
        assert {result.value for result in results} == {str(cache / "file.bin")}
    assert [request.path for request in origin.requests()] == ["/file.bin.sha256", "/file.bin"]


@pytest.mark.fault(18)
def test_wrong_sidecar(origin, cache):
    url = origin.add("file.bin", CONTENT)
    origin.add("file.bin.sha256", WRONG.encode())
    expect(errors_of(fetch, url, cache, sidecar=True), rankload.errors.DigestMismatchError, url, "(sidecar)")
    assert files_in(cache) == QUARANTINED


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no SHA-256"),
        (b"<html>not here</html>", "holds no SHA-256"),
        (b"0123456789abcdef0123456789abcdef  file.bin", "holds no SHA-256"),
        (f"{SHA256}  a.bin\n{WRONG}  b.bin\n".encode(), "holds several digests, and none for file.bin"),
    ],
)
def test_sidecar_without_a_digest(origin, cache, content, text):
    url = origin.add("file.bin", CONTENT)
    sidecar = origin.add("file.bin.sha256", content)
    expect(errors_of(fetch, url, cache, sidecar=True), rankload.FetchError, sidecar, "sidecar=True", text)
    assert origin.request_count("file.bin") == 0
    assert files_in(cache) == []


def test_missing_sidecar(origin, cache):
    url = origin.add("file.bin", CONTENT)
    errors = errors_of(fetch, url + "?sig=SECRET", cache, sidecar=True)
    expect(errors, rankload.errors.HTTPStatusError, f"{url}.sha256", "404")
    assert "SECRET" not in str(errors)
    assert origin.request_count() == 1


def test_sidecar_that_is_unavailable_once(origin, cache):
    url = origin.add("file.bin", CONTENT)
    origin.add("file.bin.sha256", SHA256.encode(), Reply(status=503), Reply())
    assert rankload.dist_fetch(url, cache, sidecar=True).read_bytes() == CONTENT


def test_busy_sidecar_is_given_up_when_another_rank_fails(origin):
    """Long before its Retry-After is over."""
    url, reports = origin.add("file.bin", CONTENT), []
    origin.add("file.bin.sha256", b"", Reply.busy(60))

    def report(progress):
        reports.append(progress)
        if len(reports) == 4:
            raise InterruptedError("another rank's")

    with pytest.raises(InterruptedError):
        fetch_sidecar(Url.parse(url), (), report, Settings())
    assert [progress.phase for progress in reports] == ["connecting", "backoff", "backoff", "backoff"]
    assert origin.request_count() == 1


def test_sidecar_of_a_mirror(origin, cache):
    first, second = origin.add("file.bin", CONTENT), origin.add("mirror/file.bin", CONTENT)
    origin.add("mirror/file.bin.sha256", SHA256.encode())
    rankload.dist_fetch([first, second], cache, sidecar=True)
    assert origin.request_count("mirror/file.bin") == 0
    assert record_in(cache)["vouched_by"] == "sidecar"


def test_file_that_was_cached_without_its_sidecar_is_compared_once(origin, cache):
    url = origin.add("file.bin", CONTENT)
    origin.add("file.bin.sha256", SHA256.encode())
    rankload.dist_fetch(url, cache)
    assert record_in(cache)["vouched_by"] is None
    for _ in range(2):
        rankload.dist_fetch(url, cache, sidecar=True)
    assert record_in(cache)["vouched_by"] == "sidecar"
    assert (origin.request_count("file.bin"), origin.request_count("file.bin.sha256")) == (1, 1)


@pytest.mark.fault(18)
def test_cached_file_that_its_sidecar_contradicts_is_fetched_again(origin, cache):
    url = origin.add("file.bin", b"an old version")
    rankload.dist_fetch(url, cache)
    origin.add("file.bin", CONTENT)
    origin.add("file.bin.sha256", SHA256.encode())
    assert rankload.dist_fetch(url, cache, sidecar=True).read_bytes() == CONTENT


def test_sidecar_is_not_asked_for_when_the_digest_is_given(origin, cache):
    url = origin.add("file.bin", CONTENT)
    rankload.dist_fetch(url, cache, sidecar=True, sha256=SHA256)
    assert origin.request_count("file.bin.sha256") == 0
