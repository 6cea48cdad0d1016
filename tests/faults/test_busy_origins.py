"""Origins that are busy, slow, or sign URLs for a while only; and how many streams a download uses there."""

from __future__ import annotations

import email.utils
import time

import pytest

import rankload
from harness.chaos import Fault, chaos
from harness.fetch_calls import errors_of, expect, fetch, files_in, ranges_asked
from harness.nginx import bytes_of_files, nginx
from harness.nginx_behaviours import at_most, busy_at_first, busy_share, rate
from harness.ranks import run_ranks
from harness.replies import Reply

CHUNK = 256 << 10


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(CHUNK))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")  # one answer to the first request would be all there is to see


@pytest.fixture
def one_stream(monkeypatch):
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")


@pytest.fixture
def root(tmp_path, big_content):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "file.bin").write_bytes(big_content)
    return folder


def expect_fetched(results, cache, content):
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == content


SIGNED = [Reply(redirect_to=f"/signed/{number}?sig=SECRET") for number in (1, 2)]


@pytest.mark.fault(8)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_signed_url_that_expires(origin, cache, big_content, one_stream, status):
    """Your own URL is asked for a fresh one, and the download goes on where it was."""
    signed = [Reply(), Reply(), Reply(status=status)]
    origin.add("signed/1", big_content, *signed)
    origin.add("signed/2", big_content)
    url = origin.add("file.bin", b"", *SIGNED)
    results = run_ranks(fetch, 2, args=(url, cache))
    expect_fetched(results, cache, big_content)
    assert origin.request_count("file.bin") == 2
    [refused, *later] = ranges_asked(origin)[-len(origin.requests("signed/2")) - 2 :]
    assert refused == later[0] == later[1]  # asked at the old URL, at yours, at the new one
    assert sum(request.body_bytes_sent for request in origin.requests() if request.status == 206) == len(big_content)
    assert "SECRET" not in "".join(result.stderr for result in results)


@pytest.mark.fault(8)
def test_signed_url_that_expires_for_several_streams(origin, cache, big_content):
    slow = {"bytes_per_second": 4e6}
    origin.add("signed/1", big_content, expires_after_bytes=3 << 20, **slow)
    origin.add("signed/2", big_content, **slow)
    url = origin.add("file.bin", b"", *SIGNED)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert origin.request_count("signed/2") > 0


@pytest.mark.fault(8)
def test_signed_url_that_has_expired_for_good(origin, cache, big_content, one_stream):
    """Asked for a fresh one once, not for ever."""
    origin.add("signed", big_content, Reply(), Reply(), Reply(status=403))
    url = origin.add("file.bin", b"", redirect_to="/signed?sig=SECRET")
    errors = errors_of(fetch, url, cache)
    expect(errors, rankload.errors.HTTPStatusError, url, "HTTP Error 403", f"redirected to {origin.url('signed')}")
    assert {error.code for error in errors} == {403}
    assert "SECRET" not in str(errors)
    assert (origin.request_count("file.bin"), origin.request_count("signed")) == (2, 4)
    assert not (cache / "file.bin").exists()


DEATHS = {"status": {"status": 500}, "no answer": {"close_before_reply": True}, "silence": {"hold_before_reply": True}}


@pytest.mark.parametrize("death", DEATHS)
def test_redirects_target_that_dies(origin, cache, big_content, one_stream, monkeypatch, death):
    """Your own URL may lead to another one by then."""
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "0.3")
    monkeypatch.setenv("RANKLOAD_RETRIES", "1")
    origin.add("mirror/1", big_content, Reply(), Reply(), Reply(**DEATHS[death]))
    origin.add("mirror/2", big_content)
    url = origin.add("file.bin", b"", *(Reply(redirect_to=f"/mirror/{number}") for number in (1, 2)))
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert (origin.request_count("file.bin"), origin.request_count("mirror/1")) == (2, 3)
    assert origin.bytes_sent("mirror/1") + origin.bytes_sent("mirror/2") < len(big_content) + 1000


def test_redirect_is_followed_once(origin, cache, big_content, one_stream):
    """Later ranges are asked for where it led: a redirect may cost a round trip across an ocean."""
    origin.add("elsewhere", big_content)
    url = origin.add("file.bin", b"", redirect_to="/elsewhere")
    rankload.dist_fetch(url, cache)
    assert origin.request_count("file.bin") == 1
    assert origin.request_count("elsewhere") > 3


@pytest.mark.fault(9)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_and_the_others_are_told(origin, cache, big_content, monkeypatch, status):
    """Longer than the deadline on no progress: a declared wait is nobody's fault."""
    for name in ("REPORT", "HEARTBEAT"):
        monkeypatch.setenv(f"RANKLOAD_{name}_SECONDS", "0.2")
    url = origin.add("file.bin", big_content, Reply.busy(2, status), Reply())
    results = run_ranks(fetch, 2, args=(url, cache), kwargs={"timeout": 1.0})
    expect_fetched(results, cache, big_content)
    refused, then, *_ = origin.requests()
    assert 2 <= then.started_at - refused.ended_at < 20
    assert "waiting for rank 0" in results[1].stderr and ": backoff" in results[1].stderr


@pytest.mark.fault(9)
def test_retry_after_in_the_middle_of_a_download(origin, cache, big_content, one_stream):
    url = origin.add("file.bin", big_content, Reply(), Reply.busy(1), Reply())
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    _, refused, then, *_ = origin.requests()
    assert then.started_at - refused.ended_at >= 1
    assert refused.headers["range"] == then.headers["range"]


@pytest.mark.fault(9)
def test_retry_after_as_a_date(origin, cache, big_content):
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    url = origin.add("file.bin", big_content, Reply.busy(date), Reply())
    rankload.dist_fetch(url, cache)
    assert origin.requests()[1].started_at - origin.requests()[0].ended_at > 0.5  # whole seconds, cut off


@pytest.mark.fault(9)
def test_retry_after_has_a_limit(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRY_AFTER_SECONDS", "0.1")
    url = origin.add("file.bin", big_content, Reply.busy(3600), Reply.busy("nonsense"), Reply())
    began_at = time.monotonic()
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert time.monotonic() - began_at < 30


@pytest.mark.fault(9)
def test_too_many_requests_for_good(origin, cache, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    monkeypatch.setenv("RANKLOAD_RETRY_AFTER_SECONDS", "0.1")
    url = origin.add("file.bin", b"", Reply.busy(3600))
    expect(errors_of(fetch, url, cache), rankload.errors.HTTPStatusError, url, "HTTP Error 429", "too many requests")
    assert origin.request_count() == 3
    assert files_in(cache) == []


@pytest.mark.fault(10)
@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_unavailable_once(origin, cache, big_content, status):
    url = origin.add("file.bin", big_content, Reply(status=status), Reply())
    expect_fetched(run_ranks(fetch, 2, args=(url, cache)), cache, big_content)
    assert [request.status for request in origin.requests()][:2] == [status, 206]


@pytest.mark.fault(10)
def test_every_pause_is_told(origin, cache, big_content, one_stream, monkeypatch, caplog):
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.1")
    url = origin.add("file.bin", big_content, Reply(status=503), Reply(status=503), Reply())
    assert rankload.dist_fetch(url + "?sig=SECRET", cache).read_bytes() == big_content
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and all(url in text and "HTTP Error 503" in text and "SECRET" not in text for text in told)
    assert "retrying in 0." in told[0] and told[0].endswith("(1 of 5)") and told[1].endswith("(2 of 5)")


@pytest.mark.fault(10)
def test_nginx_unavailable_at_first(root, cache, big_content):
    with nginx(root, busy_at_first(2)) as server:
        assert rankload.dist_fetch(server.url("file.bin"), cache).read_bytes() == big_content
        assert [access.status for access in server.wait_for_accesses(3)][:3] == [503, 503, 206]


@pytest.mark.fault(10)
def test_nginx_that_is_unavailable_now_and_then(root, cache, big_content, monkeypatch):
    """Almost a third of all requests: it gets through, and fetches no byte twice."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "20")
    with nginx(root, busy_share(30)) as server:
        assert rankload.dist_fetch(server.url("file.bin"), cache).read_bytes() == big_content
        assert bytes_of_files(server.wait_for_bytes(len(big_content))) == len(big_content)


def test_several_streams_where_one_is_slow(origin, cache, big_content):
    """The origin limits each connection."""
    url = origin.add("file.bin", big_content, bytes_per_second=2e6)
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert 4 <= origin.peak_concurrency("file.bin") <= 16
    assert origin.bytes_sent() == len(big_content)  # no byte twice


def test_several_streams_of_nginx(root, cache, big_content):
    with nginx(root, rate(2_000_000)) as server, chaos(server.port) as link:
        assert rankload.dist_fetch(link.through(server.url("file.bin")), cache).read_bytes() == big_content
        assert len(link.connections) >= 4


def test_limit_on_streams(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_STREAMS", "2")
    url = origin.add("file.bin", big_content, bytes_per_second=4e6)
    rankload.dist_fetch(url, cache)
    assert origin.peak_concurrency("file.bin") == 2


@pytest.mark.fault(9)
def test_origin_that_allows_few_requests_at_a_time(origin, cache, big_content):
    url = origin.add("file.bin", big_content, max_concurrent=2, bytes_per_second=3e6)
    expect_fetched(run_ranks(fetch, 2, args=(url, cache)), cache, big_content)
    served = [request for request in origin.requests() if request.status == 206]
    assert sum(request.body_bytes_sent for request in served) == len(big_content)
    assert origin.request_count() - len(served) <= 8  # it is not asked in vain again and again


@pytest.mark.fault(9)
def test_nginx_that_allows_few_requests_at_a_time(root, cache, big_content):
    with nginx(root, at_most(2), rate(3_000_000)) as server:
        assert rankload.dist_fetch(server.url("file.bin"), cache).read_bytes() == big_content


def test_connection_is_kept_alive(root, cache, big_content, one_stream):
    with nginx(root) as server, chaos(server.port, Fault()) as link:
        rankload.dist_fetch(link.through(server.url("file.bin")), cache)
        assert len(server.wait_for_accesses(4)) >= 4
        assert len(link.connections) == 1


def test_connection_below_the_minimum_rate_is_given_up(origin, cache, big_content, one_stream, monkeypatch):
    monkeypatch.setenv("RANKLOAD_MINIMUM_BYTES_PER_SECOND", "1000000")
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "0.3")
    url = origin.add("file.bin", big_content, Reply(bytes_per_second=10_000), Reply())
    began_at = time.monotonic()
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert time.monotonic() - began_at < 20  # the first range alone would have taken 26 s
    assert ranges_asked(origin)[1].startswith("bytes=") and ranges_asked(origin)[1] != ranges_asked(origin)[0]


def test_origin_that_is_always_below_the_minimum_rate(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_MINIMUM_BYTES_PER_SECOND", "1000000")
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "0.2")
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    url = origin.add("file.bin", big_content, bytes_per_second=50_000)
    errors = errors_of(fetch, url, cache)
    expect(errors, rankload.errors.FetchTimeoutError, url, "bytes/s", "less than minimum_bytes_per_second=1000000")
