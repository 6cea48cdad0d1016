"""An origin that fails: the same clear error on every rank, and nothing left in the cache."""

from __future__ import annotations

import gzip
import urllib.error
from pathlib import Path

import pytest
import torch

import rankload
from harness.checkpoints import digest_of
from harness.fetch_calls import errors_of, expect, fetch, files_in, load, ranges_asked
from harness.nginx import nginx
from harness.nginx_behaviours import gzip_always, gzip_if_accepted, password
from harness.ports import reserved_port
from harness.ranks import run_ranks
from harness.replies import Reply


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("status", "advice"),
    [(404, "check the URL"), (401, "headers="), (403, "token"), (410, "gone for good"), (400, ""), (501, "mirror")],
)
def test_error_status_that_no_second_try_mends(origin, cache, status, advice):
    url = origin.add("model.pth", b"", Reply(status=status))
    errors = errors_of(load, url + "?sig=SECRET", cache)
    expect(errors, rankload.errors.HTTPStatusError, url, f"HTTP Error {status}", advice)
    assert {(error.code, error.rank) for error in errors} == {(status, 0)}
    assert all(isinstance(error, urllib.error.URLError) and "SECRET" not in str(error) for error in errors)
    assert origin.request_count() == 1
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (429, "too many requests"),
        (500, "try again later"),
        (503, "mirror"),
        (408, ""),
        (425, ""),
        (202, "has yet to prepare"),
    ],
)
def test_error_status_that_stays(origin, cache, monkeypatch, status, advice):
    """Tried again as often as the settings say, and then an error on every rank."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    url = origin.add("model.pth", b"", Reply(status=status, ranges="ignored"))
    errors = errors_of(load, url + "?sig=SECRET", cache)
    expect(errors, rankload.errors.HTTPStatusError, url, f"HTTP Error {status}", advice)
    assert {(error.code, error.rank) for error in errors} == {(status, 0)}
    assert "SECRET" not in str(errors)
    assert origin.request_count() == 3
    assert files_in(cache) == []


def test_host_unknown(cache):
    url = "http://no-such-host.invalid/model.pth"
    expect(errors_of(load, url, cache), rankload.errors.NetworkError, url, "host name not found", "online?")
    assert files_in(cache) == []


def test_connection_refused(cache):
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/model.pth"
        errors = errors_of(load, url + "?token=SECRET", cache)
    expect(errors, rankload.errors.NetworkError, url, "connection refused")
    assert "SECRET" not in str(errors)
    assert files_in(cache) == []


def test_connection_closed_without_an_answer(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path, close_before_reply=True)
    expect(errors_of(load, url, cache), rankload.errors.NetworkError, url)
    assert files_in(cache) == []


@pytest.mark.fault(1)
def test_connection_reset_in_the_body(origin, cache, big_content, monkeypatch):
    """Every answer breaks, and the first bytes are all that ever comes."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    url = origin.add("file.bin", big_content, Reply(reset_at=3 << 20), Reply(reset_at=0))
    errors = errors_of(fetch, url, cache)
    expect(errors, rankload.FetchError, url)
    assert isinstance(errors[0], rankload.errors.NetworkError | rankload.errors.TruncatedError)
    assert not (cache / "file.bin").exists()


@pytest.mark.fault(1)
def test_body_shorter_than_content_length(origin, cache, checkpoint, monkeypatch):
    """An origin that never sends the last byte: asked for it again and again, and then the call fails."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    url = origin.add("model.pth", checkpoint.path, Reply(truncate_at=checkpoint.size - 1), Reply(truncate_at=0))
    expect(errors_of(load, url, cache), rankload.errors.TruncatedError, url, "has 0 bytes", "1 were promised")
    last_byte = f"bytes={checkpoint.size - 1}-{checkpoint.size - 1}"
    assert ranges_asked(origin) == [None, last_byte, last_byte]
    assert files_in(cache) == []


@pytest.mark.fault(3)
def test_chunked_body_cut_short(origin, cache, checkpoint, monkeypatch):
    """No range can be asked for, so that each try starts at the first byte."""
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    behaviour = {"is_chunked": True, "ranges": "ignored", "truncate_at": checkpoint.size // 2}
    url = origin.add("model.pth", checkpoint.path, **behaviour)
    expect(errors_of(load, url, cache), rankload.errors.TruncatedError, url, "in the middle of a chunk")
    assert origin.request_count() == 3
    assert files_in(cache) == []


def test_chunked_body_is_whole(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path, is_chunked=True, ranges="ignored")
    [result] = run_ranks(load, 1, env="none", args=(url, cache))
    assert result.value == digest_of(checkpoint.content)
    assert origin.request_count() == 1


@pytest.mark.fault(2)
def test_body_without_length_cut_short(origin, cache, checkpoint):
    """Nothing on the wire tells: the archive's own structure does. It may have been an accident: once more."""
    behaviour = {"content_length": False, "ranges": "ignored", "truncate_at": checkpoint.size - 100}
    url = origin.add("model.pth", checkpoint.path, **behaviour)
    expect(errors_of(load, url, cache), rankload.errors.NotACheckpointError, url, "expected a checkpoint")
    assert origin.request_count() == 2
    assert files_in(cache) == []


@pytest.mark.fault(2)
def test_body_without_length_cut_short_once(origin, cache, checkpoint):
    behaviour = {"content_length": False, "ranges": "ignored"}
    cut, whole = Reply(**behaviour, truncate_at=checkpoint.size - 100), Reply(**behaviour)
    url = origin.add("model.pth", checkpoint.path, cut, whole)
    results = run_ranks(load, 2, args=(url, cache))
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 2


def test_body_without_length_is_whole(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path, content_length=False, ranges="ignored")
    [result] = run_ranks(load, 1, env="none", args=(url, cache))
    assert result.value == digest_of(checkpoint.content)


@pytest.mark.fault(14)
@pytest.mark.parametrize("timeout", [0.5, 2])
@pytest.mark.parametrize("behaviour", [{"hold_at": 0}, {"hold_before_reply": True}])
def test_stalled_origin(origin, cache, checkpoint, behaviour, timeout):
    """The rank that downloads says what is wrong before the others find that it does not move."""
    url = origin.add("model.pth", checkpoint.path, **behaviour)
    errors = errors_of(load, url, cache, timeout=timeout)
    expect(errors, rankload.errors.FetchTimeoutError, url, "within the deadline", "timeout=")
    assert isinstance(errors[0], TimeoutError)
    assert files_in(cache) == []


@pytest.mark.fault(15)
def test_trickling_origin_succeeds(origin, cache, checkpoint):
    """The deadline is on no progress: a download may take longer than it. It may be shorter than a heartbeat, too."""
    url = origin.add("model.pth", checkpoint.path, bytes_per_second=checkpoint.size / 1.5)
    results = run_ranks(load, 2, args=(url, cache), kwargs={"timeout": 0.6})
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert origin.request_count() == 1


@pytest.mark.fault(12)
def test_html_page_instead_of_the_file(origin, cache):
    url = origin.add("model.pth", b"", Reply.html_page())
    texts = (url, "expected a checkpoint", "<!DOCTYPE html>", "Sign in")
    expect(errors_of(load, url, cache), rankload.errors.NotACheckpointError, *texts)
    assert files_in(cache) == []


@pytest.mark.parametrize("status", [204, 300, 302, 304])
def test_answer_that_has_no_file(origin, cache, status):
    """A redirect that does not say where, for one: its body is a web page at best."""
    url = origin.add("file.bin", b"", Reply(status=status, body=b"not the file"))
    expect(errors_of(fetch, url, cache), rankload.errors.HTTPStatusError, url, f"HTTP Error {status}")
    assert origin.request_count() == 1
    assert files_in(cache) == []


def test_file_that_is_not_ready_yet(origin, cache, checkpoint):
    """Some servers pack an archive when it is first asked for, and answer 202 meanwhile."""
    url = origin.add("model.pth", checkpoint.path, Reply(status=202, body=b""), Reply())
    results = run_ranks(load, 2, args=(url, cache))
    assert {result.value for result in results} == {digest_of(checkpoint.content)}


def test_partial_answer_to_a_request_for_everything(origin, cache, big_content):
    """206 and no Content-Range, asked for a range or not: what part it is cannot be known."""
    url = origin.add("file.bin", big_content, status=206, ranges="ignored")
    expect(errors_of(fetch, url, cache), rankload.FetchError, url, "requested the whole file", "Content-Range '(none)'")
    assert ranges_asked(origin) == [None]
    assert files_in(cache) == []


@pytest.mark.fault(13)
@pytest.mark.parametrize("is_asked_for", [True, False])
def test_nginx_compresses(tmp_path, cache, checkpoint, is_asked_for):
    """Only whoever accepts gzip gets it, from a well-behaved server; from the other one everybody does."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/model.pth").write_bytes(checkpoint.path.read_bytes())
    (tmp_path / "root/model.pth.gz").write_bytes(gzip.compress(checkpoint.path.read_bytes()))
    with nginx(tmp_path / "root", gzip_if_accepted() if is_asked_for else gzip_always()) as server:
        url = server.url("model.pth")
        if is_asked_for:
            assert rankload.dist_fetch(url, cache, sha256=checkpoint.sha256).stat().st_size == checkpoint.size
        else:
            expect(errors_of(load, url, cache), rankload.FetchError, url, "Content-Encoding gzip")
            assert files_in(cache) == []


@pytest.mark.fault(11)
def test_nginx_wants_a_password(tmp_path, cache, monkeypatch):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file.bin").write_bytes(b"content")
    with nginx(tmp_path / "root", password("user", "SECRET")) as server:
        url = server.url("file.bin")
        expect(errors_of(fetch, url, cache), rankload.errors.HTTPStatusError, url, "HTTP Error 401", "~/.netrc")
        errors = errors_of(fetch, url.replace("//", "//user:SECRET-AND-WRONG@"), cache)
        expect(errors, rankload.errors.HTTPStatusError, url, "HTTP Error 401")
        assert "SECRET" not in str(errors)
        assert len(server.wait_for_accesses(2)) == 2  # not tried again
        assert rankload.dist_fetch(url.replace("//", "//user:SECRET@"), cache).read_bytes() == b"content"


@pytest.mark.fault(13)
def test_gzip_although_identity_was_asked_for(origin, cache, checkpoint):
    url = origin.add("model.pth", checkpoint.path, is_gzipped=True)
    expect(errors_of(load, url, cache), rankload.FetchError, url, "Content-Encoding gzip", "cannot be verified")
    assert files_in(cache) == []


@pytest.mark.parametrize("coding", ["aws-chunked", "utf-8", "identity", "none", ""])
def test_words_that_are_no_content_coding(origin, cache, checkpoint, coding):
    """Object stores give back what the uploader has set."""
    url = origin.add("model.pth", checkpoint.path, Reply(headers={"Content-Encoding": coding}))
    assert rankload.dist_fetch(url, cache, sha256=checkpoint.sha256).stat().st_size == checkpoint.size


@pytest.mark.parametrize("coding", ["GZIP", "x-gzip", "utf-8, br", "zstd"])
def test_content_codings(origin, cache, checkpoint, coding):
    url = origin.add("model.pth", checkpoint.path, Reply(headers={"Content-Encoding": coding}))
    expect(errors_of(load, url, cache), rankload.FetchError, url, "Content-Encoding", "cannot be verified")


@pytest.mark.fault(75)
@pytest.mark.parametrize("status", [400, 403, 404, 405, 406, 501, 503])
def test_ranges_are_refused_by_a_status(origin, cache, big_content, monkeypatch, status):
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.01")
    url = origin.add("file.bin", big_content, Reply(range_status=status))
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {Path(result.value).read_bytes() == big_content for result in results} == {True}
    assert ranges_asked(origin)[-1] is None
    assert origin.bytes_sent() < len(big_content) + 1000


@pytest.mark.fault(75)
@pytest.mark.parametrize("status", [400, 403, 404, 405, 406, 501, 503])
def test_ranges_are_refused_after_the_connection_broke(origin, cache, big_content, monkeypatch, status):
    """Nothing can be gone on with: the whole file is asked for again."""
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.01")
    url = origin.add("file.bin", big_content, Reply(truncate_at=1 << 20), Reply(range_status=status))
    results = run_ranks(fetch, 2, args=(url, cache))
    assert {Path(result.value).read_bytes() == big_content for result in results} == {True}
    assert ranges_asked(origin)[-1] is None


@pytest.mark.fault(75)
def test_one_error_of_the_origin_does_not_cost_its_ranges(origin, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.01")
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", "65536")
    url = origin.add("file.bin", big_content, Reply(status=503), Reply())
    assert rankload.dist_fetch(url, cache).read_bytes() == big_content
    assert None not in ranges_asked(origin)


@pytest.mark.fault(75)
def test_open_checkpoint_says_that_ranges_are_refused(origin, tmp_path):
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "model.pth")
    url = origin.add("model.pth", tmp_path / "model.pth", Reply(range_status=403))
    with pytest.raises(rankload.FetchError, match="serves only the whole file"):
        rankload.open_checkpoint(url)


@pytest.mark.fault(16)
def test_redirect_without_end(origin, cache):
    url = origin.add("model.pth", b"", redirect_to="/model.pth?token=SECRET")
    errors = errors_of(load, url, cache)
    expect(errors, rankload.FetchError, url, "too many redirects")
    assert "SECRET" not in str(errors)
    assert origin.request_count() == 11


def test_redirect_to_another_kind_of_url(origin, cache):
    url = origin.add("model.pth", b"", redirect_to="ftp://host.invalid/model.pth?token=SECRET")
    errors = errors_of(load, url, cache)
    expect(errors, rankload.FetchError, url)
    assert "SECRET" not in str(errors)


def test_error_after_a_redirect_names_where_it_led(origin, cache):
    origin.add("gone.pth", b"", status=404)
    url = origin.add("model.pth", b"", redirect_to="/gone.pth?token=SECRET")
    errors = errors_of(load, url, cache)
    expect(errors, rankload.errors.HTTPStatusError, url, origin.url("gone.pth"))
    assert "SECRET" not in str(errors)
