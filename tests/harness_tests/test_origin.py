"""The origin counts exactly, and is wrong only when told to be, and then exactly as told."""

import contextlib
import gzip
import http.client
import socket
import threading

import pytest

from harness.client import get
from harness.origin import Origin, Reply
from harness.rank import mark
from harness.ranks import run_ranks, start_ranks

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def test_a_plain_file(origin):
    url = origin.add("folder/a model.pth", CONTENT)
    status, headers, body = get(url + "?token=secret", Accept_Encoding="identity")
    assert (status, body) == (200, CONTENT)
    assert headers["Content-Length"] == str(len(CONTENT))
    assert headers["ETag"].strip('"')
    assert headers["Last-Modified"].endswith("GMT")
    [request] = origin.requests("folder/a model.pth")
    assert (request.method, request.query, request.status) == ("GET", "token=secret", 200)
    assert request.headers["accept-encoding"] == "identity"
    assert request.is_complete
    assert request.body_bytes_sent == len(CONTENT)
    assert origin.request_count("another") == 0


def test_a_file_on_disk(origin, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert get(origin.add("x", tmp_path / "file"))[2] == CONTENT
    (tmp_path / "none").touch()
    assert get(origin.add("y", tmp_path / "none"))[2] == b""


def test_head_sends_no_body(origin):
    status, headers, body = get(origin.add("x", CONTENT), method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(len(CONTENT)), b"")
    assert origin.bytes_sent("x") == 0


def test_connections_are_kept(origin):
    origin.add("x", b"one")
    connection = http.client.HTTPConnection("127.0.0.1", origin.port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/x")
        assert connection.getresponse().read() == b"one"
        local = connection.sock.getsockname()
    assert connection.sock.getsockname() == local
    connection.close()
    assert origin.request_count("x") == 3


def test_an_unknown_path_is_404(origin):
    assert get(origin.url("nothing"))[0] == 404
    assert origin.request_count("nothing") == 1


def fetch(rank, url, times):
    return [len(get(url)[2]) for _ in range(times)]


def test_counts_are_exact_the_moment_the_clients_are_done(origin):
    url = origin.add("x", CONTENT)
    results = run_ranks(fetch, 4, env="none", args=(url, 5))
    assert [result.value for result in results] == [[len(CONTENT)] * 5] * 4
    assert origin.request_count("x") == origin.completed_count("x") == 20
    assert origin.bytes_sent("x") == 20 * len(CONTENT)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 416, 500, 503])
def test_error_statuses(origin, status):
    assert get(origin.add("x", CONTENT, status=status))[0] == status
    assert origin.bytes_sent("x") < 100


def test_replies_in_turn(origin):
    url = origin.add("x", CONTENT, Reply.busy(7), Reply(status=503), Reply())
    seen = [get(url) for _ in range(4)]
    assert [status for status, _, _ in seen] == [429, 503, 200, 200]
    assert seen[0][1]["Retry-After"] == "7"
    assert seen[3][2] == CONTENT


def test_a_login_page(origin):
    status, headers, body = get(origin.add("x", CONTENT, Reply.html_page()))
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert body.startswith(b"<!DOCTYPE html>")


def test_required_headers(origin):
    url = origin.add("x", CONTENT, required_headers={"Authorization": "Bearer right"})
    assert get(url)[0] == 401
    assert get(url, Authorization="Bearer wrong")[0] == 401
    assert get(url, Authorization="Bearer right")[2] == CONTENT


def test_a_redirect(origin):
    url = origin.add("x", redirect_to="/y")
    status, headers, _ = get(url)
    assert (status, headers["Location"]) == (302, "/y")
    assert get(origin.add("z", redirect_to="/y", status=307))[0] == 307


def test_without_content_length(origin):
    _, headers, body = get(origin.add("x", CONTENT, content_length=False))
    assert "Content-Length" not in headers
    assert body == CONTENT


def test_a_wrong_content_length(origin):
    with pytest.raises(http.client.IncompleteRead):
        get(origin.add("x", CONTENT, content_length=len(CONTENT) + 1))


def test_chunked(origin):
    _, headers, body = get(origin.add("x", CONTENT, is_chunked=True))
    assert headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in headers
    assert body == CONTENT
    assert origin.bytes_sent("x") == len(CONTENT)  # the framing does not count


def test_gzip_that_nobody_asked_for(origin):
    _, headers, body = get(origin.add("x", CONTENT, is_gzipped=True), Accept_Encoding="identity")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == CONTENT


def test_headers_can_be_set_and_left_out(origin):
    url = origin.add("x", CONTENT, headers={"X-Linked-Etag": "abc", "Last-Modified": None}, etag=False)
    _, headers, _ = get(url)
    assert headers["X-Linked-Etag"] == "abc"
    assert "Last-Modified" not in headers
    assert "ETag" not in headers


def test_the_etag_follows_the_content(origin):
    first = get(origin.add("x", b"one"))[1]["ETag"]
    second = get(origin.add("x", b"two"))[1]["ETag"]
    assert first != second


@pytest.mark.parametrize("behaviour", [{}, {"is_chunked": True}])
def test_a_truncated_body(origin, behaviour):
    url = origin.add("x", CONTENT, truncate_at=1000, **behaviour)
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(url)
    assert caught.value.partial == CONTENT[:1000]
    assert origin.bytes_sent("x") == 1000
    assert origin.completed_count("x") == 0


def test_a_truncated_body_without_a_length_looks_whole(origin):
    assert get(origin.add("x", CONTENT, truncate_at=1000, content_length=False))[2] == CONTENT[:1000]


def test_a_reset(origin):
    with pytest.raises(ConnectionResetError):
        get(origin.add("x", CONTENT, reset_at=1000))


def test_no_answer_at_all(origin):
    with pytest.raises(http.client.RemoteDisconnected):
        get(origin.add("x", CONTENT, close_before_reply=True))


def test_a_flipped_byte(origin):
    body = get(origin.add("x", CONTENT, flip_byte_at=77))[2]
    assert [index for index, (ours, theirs) in enumerate(zip(body, CONTENT, strict=True)) if ours != theirs] == [77]


def test_a_trickle_takes_its_time(origin):
    url = origin.add("x", CONTENT[:3000], bytes_per_second=10_000)
    get(url)
    origin.wait_until_idle()
    [request] = origin.requests("x")
    assert request.ended_at - request.started_at >= 0.3


def fetch_and_tell(rank, url):
    body = get(url)[2]
    mark("done")
    return len(body)


def test_a_held_body_stands_still_at_the_byte_and_goes_on_when_released(origin):
    url = origin.add("x", CONTENT, hold_at=1000)
    with start_ranks(fetch_and_tell, 2, env="none", args=(url,)) as group:
        origin.wait_until_sent("x", 2000)
        origin.wait_until_held("x", 2)
        assert [request.body_bytes_sent for request in origin.requests("x")] == [1000, 1000]
        assert group.is_alive(0)
        assert group.is_alive(1)
        origin.release("x")
        assert [result.value for result in group.wait()] == [len(CONTENT)] * 2
    assert origin.completed_count("x") == 2


def test_held_before_the_reply(origin):
    url = origin.add("x", CONTENT, hold_before_reply=True)
    with start_ranks(fetch_and_tell, 1, env="none", args=(url,)) as group:
        origin.wait_until_held("x")
        assert origin.requests("x")[0].status is None
        origin.release("x")
        assert group.wait()[0].value == len(CONTENT)


def test_a_client_killed_in_the_middle(origin):
    url = origin.add("x", CONTENT, hold_at=1000)
    with start_ranks(fetch_and_tell, 1, env="none", args=(url,)) as group:
        origin.wait_until_held("x")
        group.kill(0)
        group.wait_for_end(0)
    origin.release("x")
    origin.wait_until_idle()
    assert origin.completed_count("x") == 0


@pytest.mark.parametrize("behaviour", [{"hold_at": 10}, {"hold_before_reply": True}, {"bytes_per_second": 1.0}])
def test_leaving_ends_replies_that_nobody_released(behaviour):
    before = threading.active_count()
    with Origin() as origin:
        client = socket.create_connection(("127.0.0.1", origin.port))
        origin.add("x", CONTENT, **behaviour)
        client.sendall(b"GET /x HTTP/1.1\r\nHost: here\r\n\r\n")
        origin.wait_for_requests("x", 1)
    client.settimeout(10)
    while client.recv(65536):
        pass  # up to the end of the stream: the connection is closed
    client.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=1048570-", 1048570, 1048576),
        ("bytes=-6", 1048570, 1048576),
    ],
)
def test_ranges(origin, asked, begin, end):
    status, headers, body = get(origin.add("x", CONTENT), Range=asked)
    assert (status, body) == (206, CONTENT[begin:end])
    assert headers["Content-Range"] == f"bytes {begin}-{end - 1}/{len(CONTENT)}"
    assert headers["Accept-Ranges"] == "bytes"


def test_a_range_beyond_the_end(origin):
    status, headers, _ = get(origin.add("x", CONTENT), Range=f"bytes={len(CONTENT)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(CONTENT)}")


def test_if_range(origin):
    url = origin.add("x", CONTENT)
    etag = get(url)[1]["ETag"]
    assert get(url, Range="bytes=5-9", If_Range=etag)[0] == 206
    assert get(url, Range="bytes=5-9", If_Range='"another"')[::2] == (200, CONTENT)
    liar = origin.add("x", CONTENT, ranges="if-range-ignored")
    assert get(liar, Range="bytes=5-9", If_Range='"another"')[0] == 206


@pytest.mark.parametrize(
    ("lie", "status", "content_range", "body"),
    [
        ("ignored", 200, None, CONTENT),
        ("shorter", 206, "bytes 16-17/1048576", CONTENT[16:18]),
        ("longer", 206, "bytes 16-1048575/1048576", CONTENT[16:]),
        ("shifted", 206, "bytes 16-19/1048576", CONTENT[17:20] + CONTENT[:1]),
        ("wrong-start", 206, "bytes 0-19/1048576", CONTENT[:20]),
        ("wrong-total", 206, "bytes 16-19/1048577", CONTENT[16:20]),
        ("no-content-range", 206, None, CONTENT[16:20]),
        ("refused", 416, "bytes */1048576", None),
    ],
)
def test_lies_about_ranges(origin, lie, status, content_range, body):
    seen_status, headers, seen_body = get(origin.add("x", CONTENT, ranges=lie), Range="bytes=16-19")
    assert (seen_status, headers["Content-Range"]) == (status, content_range)
    assert body is None or seen_body == body


def test_a_held_and_truncated_range(origin):
    url = origin.add("x", CONTENT, hold_at=10, truncate_at=20)
    with start_ranks(fetch_range, 1, env="none", args=(url,)) as group:
        origin.wait_until_held("x")
        origin.release("x")
        [result] = group.wait()
    assert result.exception.type_name == "IncompleteRead"
    assert origin.bytes_sent("x") == 20


def fetch_range(rank, url):
    return get(url, Range="bytes=100-999")[2]


def test_a_range_of_one_byte_cannot_be_shorter(origin):
    assert get(origin.add("x", CONTENT, ranges="shorter"), Range="bytes=16-16")[2] == CONTENT[16:17]


def test_at_most_so_many_at_a_time(origin):
    url = origin.add("x", CONTENT, max_concurrent=2, hold_at=10, headers={"Retry-After": "3"})
    with start_ranks(fetch_range, 2, env="none", args=(url,)) as group:
        origin.wait_until_held("x", 2)
        status, headers, _ = get(url)
        assert (status, headers["Retry-After"]) == (429, "3")
        origin.release("x")
        assert [result.value for result in group.wait()] == [CONTENT[100:1000]] * 2
    # Their last byte made room, whether or not the origin's threads have ended.
    assert get(url)[2] == CONTENT
    assert origin.peak_concurrency("x") == 3


@pytest.mark.parametrize("behaviour", [{}, {"is_chunked": True}, {"truncate_at": 9}, {"reset_at": 9}])
def test_one_after_the_other_are_never_two_at_a_time(origin, behaviour):
    url = origin.add("x", CONTENT[:1000], max_concurrent=1, **behaviour)
    for _ in range(50):
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            get(url)
    assert {request.status for request in origin.requests("x")} == {200}
    assert origin.peak_concurrency("x") == 1
    assert origin.peak_concurrency("nothing") == 0


def test_a_signed_url_that_expires(origin):
    url = origin.add("x", CONTENT, expires_after_bytes=200)
    assert [get(url, Range="bytes=0-99")[0] for _ in range(3)] == [206, 206, 403]
    # Signed anew.
    assert get(origin.add("x", CONTENT, expires_after_bytes=200))[2] == CONTENT


def test_a_redirect_to_another_url_each_time(origin):
    url = origin.add("x", b"", Reply(redirect_to="/first"), Reply(redirect_to="/second"))
    assert [get(url)[1]["Location"] for _ in range(3)] == ["/first", "/second", "/second"]
