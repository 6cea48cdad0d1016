"""Ranges: a cut download goes on where it broke off, and what an origin gets wrong about ranges does no harm."""

from __future__ import annotations

import hashlib

import pytest

import rankload
from harness.fetch_calls import errors_of, expect, fetch, files_in, ranges_asked
from harness.nginx import bytes_of_files, nginx
from harness.nginx_behaviours import no_ranges
from harness.ranks import run_ranks, start_ranks
from harness.replies import Reply

CHUNK = 1 << 20


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(CHUNK))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")  # one answer to the first request would be all there is to see
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")


@pytest.fixture(scope="module")
def other_content(big_content):
    """Another version, as long."""
    return bytes(byte ^ 0xFF for byte in big_content[:4096]) * (len(big_content) // 4096)


def bounds(ranges):
    """Begin and end (exclusive) of each Range header."""
    return [tuple(int(number) + index for index, number in enumerate(one[6:].split("-"))) for one in ranges]


def etag_of(content):
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def test_file_is_fetched_in_ranges_of_one_version(origin, cache, big_content):
    url = origin.add("file.bin", big_content)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    first, *later = origin.requests()
    assert first.headers["range"] == f"bytes=0-{CHUNK - 1}"
    assert "if-range" not in first.headers  # nothing is known yet that could have changed
    assert later and {request.headers["if-range"] for request in later} == {etag_of(big_content)}
    asked = bounds(ranges_asked(origin))
    assert [begin for begin, _ in asked] == [0, *(end for _, end in asked[:-1])]
    assert asked[-1][1] == len(big_content)


@pytest.mark.fault(1)
@pytest.mark.parametrize("cut_at", [0, 1, 700_000])
def test_cut_body_goes_on_where_it_broke_off(origin, cache, big_content, cut_at):
    url = origin.add("file.bin", big_content, Reply(), Reply(truncate_at=cut_at), Reply())
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    assert origin.bytes_sent() == len(big_content)  # each byte once
    assert bounds(ranges_asked(origin))[2][0] == CHUNK + cut_at
    assert origin.requests()[2].headers["if-range"] == etag_of(big_content)


@pytest.mark.fault(1)
def test_reset_connection_goes_on_where_it_broke_off(origin, cache, big_content):
    url = origin.add("file.bin", big_content, Reply(), Reply(reset_at=500_000), Reply())
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert CHUNK <= bounds(ranges_asked(origin))[2][0] <= CHUNK + 500_000  # a reset drops what is under way


@pytest.mark.fault(1)
def test_origin_that_cuts_every_answer_is_borne_with(origin, cache, big_content, monkeypatch):
    """Far more cuts than retries: what counts is failures without a byte."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "1")
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.001")
    url = origin.add("file.bin", big_content, truncate_at=CHUNK // 2)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert origin.request_count() == 16
    assert origin.bytes_sent() == len(big_content)


@pytest.mark.fault(1)
def test_cut_for_good_fails_everywhere_and_the_next_call_goes_on(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "1")
    url = origin.add("file.bin", big_content, Reply(), Reply(truncate_at=CHUNK // 2), Reply(truncate_at=0))
    expect(errors_of(fetch, url, cache), rankload.errors.TruncatedError, url, "has 0 bytes", "were promised")
    assert not (cache / "file.bin").exists()
    before = origin.bytes_sent()
    assert before == CHUNK + CHUNK // 2
    results = run_ranks(fetch, 2, args=(origin.add("file.bin", big_content), cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    assert origin.bytes_sent() == len(big_content)
    assert all("if-range" in request.headers for request in origin.requests()[-3:])
    assert files_in(cache) == [".rankload/file.bin.json", "file.bin"]


@pytest.mark.fault(3)
def test_chunked_ranges_that_are_cut_are_resumed(origin, cache, big_content):
    url = origin.add("file.bin", big_content, Reply(is_chunked=True), Reply(is_chunked=True, truncate_at=400_000),
                     Reply(is_chunked=True))  # fmt: skip
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert bounds(ranges_asked(origin))[2][0] == CHUNK + 400_000


@pytest.mark.fault(3)
def test_chunked_file_that_is_cut_is_fetched_again(origin, cache, big_content):
    whole = {"is_chunked": True, "ranges": "ignored"}
    url = origin.add("file.bin", big_content, Reply(**whole, truncate_at=5 << 20), Reply(**whole))
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    assert ranges_asked(origin)[1:] == [None]


@pytest.mark.fault(4)
def test_origin_that_ignores_ranges_sends_the_file_once(origin, cache, big_content):
    url = origin.add("file.bin", big_content, ranges="ignored")
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert origin.request_count() == 1


@pytest.mark.fault(4)
def test_range_that_is_ignored_later_makes_it_start_from_the_first_byte(origin, cache, big_content):
    url = origin.add("file.bin", big_content, Reply(), Reply(), Reply(ranges="ignored"))
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    assert origin.request_count() == 4


@pytest.mark.fault(4)
def test_range_that_is_ignored_by_the_next_run(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    url = origin.add("file.bin", big_content, Reply(), Reply(status=503))
    with pytest.raises(rankload.errors.HTTPStatusError):
        rankload.dist_fetch(url, cache)
    origin.add("file.bin", big_content, ranges="ignored")
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content


@pytest.mark.fault(4)
def test_nginx_without_ranges(tmp_path, cache, big_content):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file.bin").write_bytes(big_content)
    with nginx(tmp_path / "root", no_ranges()) as server:
        assert rankload.dist_fetch(server.url("file.bin"), cache).read_bytes() == big_content
        [access] = server.wait_for_accesses(1)
    assert (access.status, access.range) == (200, f"bytes=0-{CHUNK - 1}")


def test_nginx_with_ranges(tmp_path, cache, big_content):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file.bin").write_bytes(big_content)
    with nginx(tmp_path / "root") as server:
        assert rankload.dist_fetch(server.url("file.bin"), cache).read_bytes() == big_content
        accesses = server.wait_for_bytes(len(big_content))
    assert {access.status for access in accesses} == {206}
    assert bytes_of_files(accesses) == len(big_content)


WRONG_RANGES = ["wrong-start", "wrong-total", "no-content-range", "shorter", "longer", "shifted"]


@pytest.mark.fault(5)
@pytest.mark.parametrize("ranges", WRONG_RANGES)
def test_wrong_ranges_always(origin, cache, big_content, ranges):
    """With a digest, since nothing but it shows that the bytes of a range are another range's ("shifted")."""
    url = origin.add("file.bin", big_content, ranges=ranges)
    path = rankload.dist_fetch(url, cache, sha256=hashlib.sha256(big_content).hexdigest())
    assert path.read_bytes() == big_content
    assert (ranges_asked(origin)[-1] is None) == (ranges != "shorter")  # the rest of a short one can be asked for
    assert not list(cache.glob("*.partial*"))


@pytest.mark.fault(5)
@pytest.mark.parametrize("ranges", ["wrong-start", "no-content-range", "shorter"])
def test_wrong_range_once(origin, cache, big_content, ranges):
    """It is asked for again; what came before stays."""
    url = origin.add("file.bin", big_content, Reply(), Reply(ranges=ranges), Reply())
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    asked = bounds(ranges_asked(origin))
    assert [begin for begin, _ in asked].count(0) == 1
    assert ranges == "shorter" or asked[2][0] == asked[1][0]


@pytest.mark.fault(5)
@pytest.mark.parametrize("ranges", ["wrong-start", "shifted"])
def test_wrong_ranges_and_no_whole_file_either(origin, cache, big_content, ranges, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    damaged = Reply(ranges=ranges, flip_byte_at=5 << 20)
    url = origin.add("file.bin", big_content, damaged)
    sha256 = hashlib.sha256(big_content).hexdigest()
    expect(errors_of(fetch, url, cache, sha256=sha256), rankload.errors.DigestMismatchError, url, "invalid hash value")
    assert files_in(cache) == [".rankload/quarantine/file.bin", ".rankload/quarantine/file.bin.json"]


@pytest.mark.fault(6)
@pytest.mark.parametrize("ranges", ["honest", "if-range-ignored"])
def test_file_that_changes_between_two_ranges(origin, cache, big_content, other_content, ranges):
    url = origin.add("file.bin", big_content, Reply(), Reply(hold_at=1000))
    with start_ranks(fetch, 2, args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        origin.add("file.bin", other_content, ranges=ranges)
        origin.release("file.bin")
        results = group.wait()
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == other_content
    assert "the file changed while it was fetched" in results[0].stderr
    assert origin.requests()[2].headers["if-range"] == etag_of(big_content)


@pytest.mark.fault(6)
@pytest.mark.parametrize("ranges", ["honest", "if-range-ignored"])
def test_file_that_changes_between_two_runs(origin, cache, big_content, other_content, ranges, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    url = origin.add("file.bin", big_content, Reply(), Reply(), Reply(status=503))
    expect(errors_of(fetch, url, cache), rankload.errors.HTTPStatusError, "503")
    origin.add("file.bin", other_content, ranges=ranges)
    assert rankload.dist_fetch(url, cache).read_bytes() == other_content
    assert origin.requests()[3].headers["if-range"] == etag_of(big_content)


@pytest.mark.fault(6)
def test_file_that_changes_all_the_time_is_fetched_in_one_piece(origin, cache, big_content):
    url = origin.add("file.bin", big_content, *(Reply(etag=f'"{number}"') for number in range(20)))
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert ranges_asked(origin)[-1] is None
    assert origin.request_count() < 10


@pytest.mark.fault(6)
def test_weak_etag_is_compared_but_never_sent(origin, cache, big_content, other_content):
    """A weak validator may not stand in If-Range (RFC 9110, 13.1.5)."""
    url = origin.add("file.bin", big_content, Reply(etag='W/"1"'), Reply(etag='W/"1"'), Reply(etag='W/"2"'))
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert not any("if-range" in request.headers for request in origin.requests())
    assert [begin for begin, _ in bounds(ranges_asked(origin))].count(0) == 2  # the change was seen


@pytest.mark.fault(6)
@pytest.mark.parametrize("bare", [{"last_modified": None}, {}], ids=["none", "date"])
def test_range_that_has_no_validator_in_common_is_not_taken(origin, cache, big_content, other_content, bare):
    """Another server of a farm, which may have another version: not until one answer has it all."""
    first = Reply(last_modified=None, hold_at=CHUNK)
    url = origin.add("file.bin", big_content, first)
    with start_ranks(fetch, 1, env="none", args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        origin.add("file.bin", other_content, etag=False, ranges="if-range-ignored", **bare)
        origin.release("file.bin")
        [result] = group.wait()
    assert result.value == str(cache / "file.bin")
    assert (cache / "file.bin").read_bytes() == other_content
    assert ranges_asked(origin)[-1] is None


def test_range_without_date_is_taken_if_the_etag_is_the_same(origin, cache, big_content):
    """As some CDNs answer."""
    url = origin.add("file.bin", big_content, Reply(), Reply(last_modified=None))
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert origin.bytes_sent() == len(big_content)


def test_last_modified_serves_where_there_is_no_etag(origin, cache, big_content):
    url = origin.add("file.bin", big_content, etag=False)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    validators = {request.headers.get("if-range") for request in origin.requests()[1:]}
    assert validators == {Reply().last_modified}


def test_file_without_validator_and_digest_comes_in_one_piece(origin, cache, big_content):
    """Ranges of two versions could not be told apart."""
    url = origin.add("file.bin", big_content, etag=False, last_modified=None)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert ranges_asked(origin) == [f"bytes=0-{CHUNK - 1}", None]
    assert origin.requests()[1].is_complete


def test_file_without_validator_comes_in_ranges_if_the_digest_is_given(origin, cache, big_content):
    url = origin.add("file.bin", big_content, etag=False, last_modified=None)
    rankload.dist_fetch(url, cache, sha256=hashlib.sha256(big_content).hexdigest())
    assert origin.bytes_sent() == len(big_content)
    assert None not in ranges_asked(origin)


@pytest.mark.fault(7)
def test_416_from_the_first_request_on(origin, cache, big_content):
    url = origin.add("file.bin", big_content, ranges="refused")
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == big_content
    assert ranges_asked(origin) == [f"bytes=0-{CHUNK - 1}", None]


@pytest.mark.fault(7)
def test_416_because_the_file_has_become_shorter(origin, cache, big_content):
    shorter = big_content[: CHUNK + 5]
    url = origin.add("file.bin", big_content, Reply(), Reply(hold_at=1000))
    with start_ranks(fetch, 2, args=(url, cache)) as group:
        origin.wait_until_held("file.bin")
        origin.add("file.bin", shorter, ranges="if-range-ignored")
        origin.release("file.bin")
        results = group.wait()
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == shorter
    assert "the file ends before byte" in results[0].stderr


def test_empty_file_has_no_first_byte(origin, cache):
    """416 to the first range, 200 without; no checkpoint and no file, the error says."""
    url = origin.add("file.bin", b"")
    with pytest.raises(rankload.errors.NotACheckpointError, match="an empty file"):
        rankload.dist_fetch(url, cache)
    assert ranges_asked(origin) == [f"bytes=0-{CHUNK - 1}", None]


@pytest.mark.fault(1)
def test_length_that_contradicts_an_earlier_answer_is_not_believed(origin, cache):
    """A proxy that cuts the file says the length of what it sends; without a digest only the other answer tells."""
    content = bytes(range(256)) * 1000
    lies = Reply(ranges="no-content-range"), Reply(ranges="no-content-range"), Reply(content_length=10)
    url = origin.add("file.bin", content, Reply(truncate_at=1000), *lies, Reply())
    assert rankload.dist_fetch(url, cache).read_bytes() == content
