"""The first request asks for the whole file: enough for a URL that answers once, and for origins wrong about ranges."""

from __future__ import annotations

import hashlib

import pytest

import rankload
from harness.fetch_calls import errors_of, expect, fetch, files_in, ranges_asked
from harness.ranks import run_ranks
from harness.replies import Reply

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(MIB))


@pytest.fixture(scope="module")
def content(big_content):
    """24 MiB: at the rates of these tests several streams would be faster, if the origin served them."""
    return big_content + big_content[::-1] + big_content


SLOW = 20e6  # bytes/s: more streams are tried after 0.1 s


def test_the_file_comes_in_one_answer(origin, cache, big_content):
    url = origin.add("file.bin", big_content)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert ranges_asked(origin) == [None]


@pytest.mark.fault(80)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 500])
def test_url_that_answers_once(origin, cache, content, status, ranks):
    """It is asked again while the first answer is on its way, refuses, and has lost nothing by it."""
    url = origin.add("file.bin", content, Reply(bytes_per_second=SLOW), Reply(status=status))
    results = run_ranks(fetch, ranks, args=(url, cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == content
    first, *later = ranges_asked(origin)
    assert first is None and later and None not in later
    assert origin.requests()[0].is_complete
    assert len(later) < 6


@pytest.mark.fault(80)
def test_url_that_closes_the_connection_the_second_time(origin, cache, content):
    url = origin.add("file.bin", content, Reply(bytes_per_second=SLOW), Reply(close_before_reply=True))
    assert rankload.dist_fetch(url, cache).read_bytes() == content
    assert origin.requests()[0].is_complete


@pytest.mark.fault(80)
@pytest.mark.parametrize("status", [403, 404, 410])
def test_url_that_answers_once_and_a_connection_that_breaks(origin, cache, big_content, status, monkeypatch):
    """The error says what to do; the next URL of the same file goes on where this one broke off."""
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    url = origin.add("file.bin", big_content, Reply(truncate_at=5 * MIB), Reply(status=status))
    errors = errors_of(fetch, url + "?X-Amz-Signature=SECRET&X-Amz-Date=1", cache)
    expect(errors, rankload.errors.HTTPStatusError, url, f"HTTP Error {status}", "one download only", "get a new one")
    assert {error.code for error in errors} == {status} and "SECRET" not in str(errors)
    assert not (cache / "file.bin").exists()
    origin.add("file.bin", big_content, Reply(), Reply(status=status))
    results = run_ranks(fetch, 2, args=(url + "?X-Amz-Signature=OTHER&X-Amz-Date=2", cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    assert ranges_asked(origin)[-1] == f"bytes={5 * MIB}-{len(big_content) - 1}"
    assert origin.bytes_sent() < len(big_content) + 1000  # each byte once, and texts of errors
    assert files_in(cache) == [".rankload/file.bin.json", "file.bin"]


def test_streams_share_what_is_left_once_the_origin_has_answered_another(origin, cache, content):
    url = origin.add("file.bin", content, bytes_per_second=SLOW)
    assert rankload.dist_fetch(url, cache).read_bytes() == content
    first, second, *_ = origin.requests()
    assert first.headers.get("range") is None and second.headers["range"] > "bytes="
    assert origin.peak_concurrency("file.bin") >= 4
    assert not first.is_complete
    assert origin.bytes_sent() < len(content) + 3 * MIB  # what was on its way over the first connection


WRONG = ["wrong-start", "wrong-total", "no-content-range", "shorter", "longer", "unknown-total", "small-total"]


@pytest.mark.fault(81)
@pytest.mark.parametrize("ranges", [*WRONG, "ignored", "refused"])
def test_ranges_that_are_wrong_while_the_first_answer_is_on_its_way(origin, cache, content, ranges):
    url = origin.add("file.bin", content, ranges=ranges, bytes_per_second=SLOW)
    assert rankload.dist_fetch(url, cache).read_bytes() == content


@pytest.mark.fault(81)
@pytest.mark.parametrize("ranges", WRONG)
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("is_known", [True, False])
def test_ranges_that_are_wrong_after_the_connection_broke(
    origin, cache, big_content, ranges, streams, is_known, monkeypatch
):
    """The file, with and without a digest that would show another one."""
    monkeypatch.setenv("RANKLOAD_STREAMS", str(streams))
    cut = Reply(truncate_at=3 * MIB + 5, bytes_per_second=SLOW)
    url = origin.add("file.bin", big_content, cut, *[Reply(ranges=ranges)] * 2, Reply(ranges=ranges, truncate_at=MIB))
    origin.add("file.bin", big_content, cut, Reply(ranges=ranges))
    sha256 = hashlib.sha256(big_content).hexdigest() if is_known else None
    assert rankload.dist_fetch(url, cache, sha256=sha256).read_bytes() == big_content


@pytest.mark.fault(81)
@pytest.mark.parametrize(
    "replies", [["wrong-total", "honest"], ["small-total", "wrong-total"], ["unknown-total", "honest"]]
)
def test_totals_that_differ_between_answers(origin, cache, big_content, replies, monkeypatch):
    """Also where the first request is for a range."""
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")
    url = origin.add("file.bin", big_content, *[Reply(ranges=ranges) for ranges in replies])
    try:
        assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    except rankload.FetchError as error:
        assert url in str(error)
        assert not (cache / "file.bin").exists()
