"""Whatever an origin answers ends in an error of rankload's, at once, and on no rank in one of Python's."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import requests

import rankload
from harness.fetch_calls import errors_of, expect, fetch, files_in
from harness.raw_origin import RawOrigin
from rankload._cache.layout import Entry

#: Nothing of it can be read as it was meant; one of each kind has once been an OverflowError, an UnusableRange, …
ANSWERS = {
    **{
        f"Retry-After: {date}": f"503 Busy\r\nRetry-After: {date}\r\nContent-Length: 0"
        for date in (
            "Mon, 99999999999999999999 Jan 2020 00:00:00 GMT",
            "Mon, 01 Jan 99999999999999 00:00:00 GMT",
            "Mon, 01 Jan 2020 00:00:00 +99999999999999",
            "9" * 18,
        )
    },
    "a range nobody asked for": "206 Partial\r\nContent-Range: bytes 0-9/*\r\nContent-Length: 10",
    "another range": "206 Partial\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 10",
    "a range without its place": "206 Partial\r\nContent-Length: 10",
    "two lengths": "200 OK\r\nContent-Length: 3\r\nContent-Length: 9",
    "a redirect whose body is of negative size": "302 Found\r\nLocation: /x\r\nTransfer-Encoding: chunked\r\n\r\n-5",
    "a redirect to an endless name": f"302 Found\r\nLocation: http://{'a.' * 30000}/\r\nContent-Length: 0",
    "a redirect to an empty label": "302 Found\r\nLocation: http://a..b/\r\nContent-Length: 0",
    "101": "101 Switching Protocols",
    "1000 headers": "200 OK\r\n" + "A: b\r\n" * 1000,
}


def answering(head, *, is_last=False):
    def reply(connection):
        while True:
            connection.read_request()
            connection.sendall(f"HTTP/1.1 {head}\r\n\r\n".encode() + b"0123456789")
            if is_last:
                return

    return reply


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    for name, value in {"RETRIES": 1, "BACKOFF_SECONDS": 0.01, "RETRY_AFTER_SECONDS": 0.1}.items():
        monkeypatch.setenv(f"RANKLOAD_{name}", str(value))
    monkeypatch.setenv("RANKLOAD_PROGRESS_SECONDS", "5")


@pytest.mark.fault(64)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("call", ["fetch", "open", "sidecar"])
def test_senseless_answer_is_an_error_of_ours(cache, answer, call):
    with RawOrigin(answering(ANSWERS[answer])) as origin:
        url = origin.url("model.safetensors")
        with pytest.raises(rankload.RankloadError):
            if call == "open":
                rankload.open_checkpoint(url)
            else:
                rankload.dist_fetch(url, cache, sidecar=call == "sidecar", progress=False)
    assert files_in(cache) == []


@pytest.mark.parametrize("answer", ["Retry-After: Mon, 01 Jan 99999999999999 00:00:00 GMT", "a range nobody asked for"])
def test_senseless_answer_for_a_sidecar_is_the_same_error_on_all_ranks(cache, answer):
    with RawOrigin(answering(ANSWERS[answer])) as origin:
        url = origin.url("file.bin")
        expect(errors_of(fetch, url, cache, sidecar=True), rankload.FetchError, f"{url}.sha256", "[rank 0 on ")


@pytest.mark.parametrize("length", ["100 ", "100\t", "100\r\nContent-Length: 100", "100, 100"])
def test_length_counts_however_it_is_written(cache, length):
    reply = answering(f"200 OK\r\nContent-Length: {length}\r\nConnection: close", is_last=True)
    promised = "has 10 bytes, but 100 were promised"
    with RawOrigin(reply) as origin, pytest.raises(rankload.errors.TruncatedError, match=promised):
        rankload.dist_fetch(origin.url("file.bin"), cache, progress=False)
    assert files_in(cache) == []


@pytest.mark.parametrize(
    "header",
    [
        *(f"Content-Length: {length}" for length in ("-10", "+10", "1_0", "9" * 19)),
        *(f"Transfer-Encoding: {coding}" for coding in ("gzip", "gzip, chunked", "chunked, chunked", "chunked\t")),
    ],
)
def test_body_is_not_read_in_another_way_than_the_origin_means(cache, header):
    """Up to the end of the connection, for example: with the sizes of the chunks among the bytes."""
    reply = answering(f"200 OK\r\n{header}\r\nConnection: close", is_last=True)
    refused = r"the length that it gives is no number|which was not requested"
    with RawOrigin(reply) as origin, pytest.raises(rankload.FetchError, match=refused):
        rankload.dist_fetch(origin.url("file.bin"), cache, progress=False)
    assert files_in(cache) == []


@pytest.mark.parametrize("cookie", ["a{number}={long}", "a=b; Path=/x{number}{long}", "a=b; Path=/{number}; x={long}"])
def test_cookies_do_not_pile_up(cache, monkeypatch, cookie):
    """Each redirect sets a quarter of a megabyte of new ones; not all of it is sent back."""

    def reply(connection):
        for hop in itertools.count():
            heads.append(connection.read_head())
            given = [cookie.format(number=f"{hop}_{one}", long="x" * 3000) for one in range(80)]
            cookies = "".join(f"Set-Cookie: {one}\r\n" for one in given)
            connection.sendall(f"HTTP/1.1 302 Found\r\n{cookies}Location: /x\r\nContent-Length: 0\r\n\r\n".encode())

    def prepare(session, request):
        kept.append(sum(len(str(vars(one))) for jar in session._cookies.values() for one in jar))
        return prepared(session, request)

    heads: list[str] = []
    kept: list[int] = []
    prepared = requests.Session.prepare_request
    monkeypatch.setattr(requests.Session, "prepare_request", prepare)
    with RawOrigin(reply) as origin, pytest.raises(rankload.FetchError, match="too many redirects"):
        rankload.dist_fetch(origin.url("file.bin"), cache, progress=False)
    assert len(heads) > 5 and max(map(len, heads)) < 128 << 10
    assert max(kept) <= 64 << 10


@pytest.mark.parametrize(
    "etag",
    ['"\u4e2d"', f'"{"x" * 100_000}"', '"\ud800"', '"\n"', ' "a"'],
    ids=["chinese", "long", "surrogate", "control", "blank"],
)
def test_validator_that_cannot_be_sent_does_not_keep_a_file_from_being_refreshed(origin, cache, etag):
    """A record may be another user's, with anything in it."""
    url = origin.add("file.bin", b"old")
    path = rankload.dist_fetch(url, cache)
    record_path = Entry(path).record_path
    record_path.write_text(json.dumps({**json.loads(record_path.read_text()), "etag": etag}))
    origin.add("file.bin", b"newer")
    assert rankload.dist_fetch(url, cache, refresh=True).read_bytes() == b"newer"


@pytest.mark.parametrize("etag", [b'"a\x00\x1b[2J\x85"', b'"a"\r\n X-Forged: yes'])
def test_validator_brings_no_control_characters_into_a_request(cache, etag, monkeypatch):
    """It would be sent wherever the origin redirects the next range."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(1 << 20))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    content, heads = bytes(range(256)) * (16 << 10), []

    def reply(connection):
        while True:
            heads.append(connection.read_head())
            asked = re.search(r"bytes=(\d+)-(\d+)", heads[-1])
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
            connection.sendall(
                f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {begin}-{end - 1}/{len(content)}\r\n".encode()
                + b"ETag: " + etag + f"\r\nContent-Length: {end - begin}\r\n\r\n".encode() + content[begin:end]
            )  # fmt: skip

    with RawOrigin(reply) as origin:
        assert rankload.dist_fetch(origin.url("file.bin"), cache, progress=False).read_bytes() == content
    assert len(heads) > 1
    for head in heads:
        lines = head.split("\r\n")
        assert all(line.isprintable() for line in lines), head
        assert not any(line.lower().startswith("x-forged") for line in lines)
