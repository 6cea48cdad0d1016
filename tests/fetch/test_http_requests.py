"""What is asked of the origin, through redirects, mirrors and proxies; and that secrets stay out of sight."""

from __future__ import annotations

import traceback

import pytest

import rankload
from harness.checkpoints import digest_of
from harness.fetch_calls import errors_of, expect, fetch, files_in, load, whole_log
from harness.origin import Origin
from harness.ports import reserved_port
from harness.ranks import run_ranks
from harness.replies import Reply

TOKEN = "Bearer SECRET-TOKEN"
QUERY = "?sig=SECRET&x=SECRET"


def all_texts(directory):
    return "\n".join(str(path) + path.read_bytes().decode(errors="replace") for path in directory.rglob("*.json"))


def test_asks_for_the_bytes_as_they_are(origin, cache):
    rankload.dist_fetch(origin.add("file.bin", b"content"), cache)
    [request] = origin.requests()
    assert request.method == "GET"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("rankload/")


def test_user_agent_of_the_callers_replaces_ours_everywhere(origin, cache):
    """Along a redirect, and at a mirror, too; other headers stay with the first URL's server."""
    with Origin() as other:
        other.add("refused.bin", b"", status=403)
        other.add("file.bin", b"content")
        urls = [origin.add("file.bin", redirect_to=other.url("refused.bin")), other.url("file.bin")]
        path = rankload.dist_fetch(urls, cache, headers={"user-agent": "Mozilla/5.0", "X-Key": "SECRET"})
        requests = [*origin.requests(), *other.requests()]
    assert path.read_bytes() == b"content"
    assert len(requests) == 3 and {request.headers["user-agent"] for request in requests} == {"Mozilla/5.0"}
    assert ["x-key" in request.headers for request in requests] == [True, False, False]


def test_refusal_says_how_to_send_another_user_agent(origin, cache):
    url = origin.add("file.bin", b"content", status=403)
    with pytest.raises(rankload.errors.HTTPStatusError, match=r'headers=\{"User-Agent": "Mozilla/5.0"\}'):
        rankload.dist_fetch(url, cache)
    with pytest.raises(rankload.errors.HTTPStatusError) as caught:
        rankload.dist_fetch(url, cache, headers={"User-Agent": "Mozilla/5.0"})
    assert "unknown clients" not in str(caught.value)


def test_headers_are_sent_and_never_shown(origin, cache, checkpoint, caplog):
    url = origin.add("model.pth", checkpoint.path, required_headers={"Authorization": TOKEN})
    with whole_log(caplog):
        path = rankload.dist_fetch(url, cache, headers={"Authorization": TOKEN})
    assert path.read_bytes() == checkpoint.path.read_bytes()
    assert "SECRET" not in caplog.text + all_texts(cache)


def test_header_of_the_caller_wins_over_netrc(origin, cache, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    url = origin.add("file.bin", b"content", required_headers={"Authorization": TOKEN})
    assert rankload.dist_fetch(url, cache, headers={"authorization": TOKEN}).read_bytes() == b"content"


def test_netrc_is_used_without_one(origin, cache, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    rankload.dist_fetch(origin.add("file.bin", b"content"), cache)
    assert origin.requests()[0].headers["authorization"].startswith("Basic ")


def test_netrc_in_another_encoding_is_passed_over(origin, cache, tmp_path, monkeypatch):
    """As other malformed ones are: it may have nothing to do with the URL."""
    (tmp_path / "netrc").write_bytes(b"# caf\xe9\nmachine other.example login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert rankload.dist_fetch(origin.add("file.bin", b"content"), cache).read_bytes() == b"content"
    assert "authorization" not in origin.requests()[0].headers


@pytest.mark.parametrize("value", [TOKEN + "\n", " " + TOKEN, TOKEN + "\N{SNOWMAN}", 42])
def test_header_that_cannot_be_sent(origin, cache, value):
    """A token read from a file with its line break is the usual one; its value must not come out in the error."""
    url = origin.add("file.bin", b"content")
    with pytest.raises(rankload.ArgumentError, match="Authorization") as caught:
        rankload.dist_fetch(url, cache, headers={"Authorization": value})
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert origin.request_count() == 0


def test_redirect_is_followed(origin, cache, checkpoint):
    origin.add("elsewhere/blob", checkpoint.path)
    url = origin.add("model.pth", b"", redirect_to="/elsewhere/blob?sig=SECRET")
    results = run_ranks(load, 2, args=(url, cache))
    assert {result.value for result in results} == {digest_of(checkpoint.content)}
    assert (cache / "model.pth").exists()
    assert "SECRET" not in all_texts(cache) + "".join(result.stderr for result in results)


def test_redirect_in_utf_8(origin, cache):
    """Which some servers write as it is: a header's bytes, that a client sees as latin-1."""
    origin.add("modèle/a b.bin", b"content")
    url = origin.add("model.bin", b"", redirect_to="/modèle/a%20b.bin?x=é".encode().decode("latin-1"))
    assert rankload.dist_fetch(url, cache).read_bytes() == b"content"
    assert origin.requests()[1].query == "x=%C3%A9"


FAILURES = {
    "status": {"status": 403},
    "truncated": {"truncate_at": 10},
    "no answer": {"close_before_reply": True},
    "reset": {"reset_at": 10},
    "stalled": {"hold_before_reply": True},
    "redirect without end": {"redirect_to": "/model.pth?sig=SECRET&again=1"},
    "redirect to nowhere": {"redirect_to": "http://[bad/model.pth?sig=SECRET"},
    "redirect without host": {"redirect_to": "http:///model.pth?sig=SECRET"},
    "gzip": {"is_gzipped": True},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_query_is_never_shown_when_it_fails(origin, cache, checkpoint, caplog, failure):
    """Not even in the traceback: the HTTP library's own errors show the full URL."""
    url = origin.add("model.pth", checkpoint.path, **FAILURES[failure])
    with whole_log(caplog), pytest.raises(rankload.FetchError) as caught:
        rankload.dist_fetch(url + QUERY, cache, timeout=0.3)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.fields) + caplog.text
    assert url in shown
    assert "SECRET" not in shown


def test_query_is_never_shown_when_nobody_listens(cache):
    with reserved_port() as port, pytest.raises(rankload.errors.NetworkError, match="connection refused") as caught:
        rankload.dist_fetch(f"http://127.0.0.1:{port}/model.pth{QUERY}", cache)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_query_and_password_are_never_shown_when_it_works(origin, cache, checkpoint, caplog):
    url = origin.add("model.pth", checkpoint.path).replace("http://", "http://user:SECRET@") + "?sig=SECRET#SECRET"
    with whole_log(caplog):
        rankload.dist_fetch(url, cache)
        rankload.dist_fetch(url, cache)
    assert origin.request_count() == 1
    assert origin.url("model.pth") in all_texts(cache)
    assert "SECRET" not in caplog.text + all_texts(cache) + str(files_in(cache))


def test_url_that_is_none(cache):
    for url in ("http://[bad/model.pth?sig=SECRET", "http:///model.pth?sig=SECRET", "http://host:port/model.pth"):
        with pytest.raises(rankload.ArgumentError) as caught:
            rankload.dist_fetch(url, cache)
        assert "SECRET" not in str(caught.value)


def test_first_mirror_is_dead(origin, cache, checkpoint, caplog):
    with reserved_port() as port:
        dead = f"http://127.0.0.1:{port}/model.pth"
        good = origin.add("model.pth", checkpoint.path)
        with whole_log(caplog):
            path = rankload.dist_fetch([dead, good], cache)
    assert path.read_bytes() == checkpoint.path.read_bytes()
    assert dead in caplog.text and "trying the next mirror" in caplog.text


def test_first_mirror_has_another_file(origin, cache, checkpoint, other_checkpoint):
    wrong = origin.add("old/model.pth", other_checkpoint.path)
    good = origin.add("model.pth", checkpoint.path)
    [result] = run_ranks(load, 1, env="none", args=([wrong, good], cache), kwargs={"sha256": checkpoint.sha256})
    assert result.value == digest_of(checkpoint.content)


def test_all_mirrors_fail(origin, cache):
    urls = [origin.add("a.pth", b"", status=404), origin.add("b.pth", b"", status=500)]
    expect(errors_of(load, urls, cache), rankload.errors.HTTPStatusError, urls[1], "500")
    assert files_in(cache) == []


def test_mirror_that_is_named_twice(origin, cache):
    """The next one is asked all the same."""
    first, second = origin.add("a.bin", b"", status=404), origin.add("b.bin", b"content")
    assert rankload.dist_fetch([first, second, first], cache).read_bytes() == b"content"
    assert origin.request_count("a.bin") == 1


def test_cached_file_of_one_mirror_serves_the_other(origin, cache):
    first, second = origin.add("a/file.bin", b"content"), origin.add("b/file.bin", b"content")
    rankload.dist_fetch(first, cache)
    rankload.dist_fetch([second, first], cache)
    assert origin.request_count() == 1


@pytest.mark.parametrize(
    ("proxy", "text"),
    [
        ("http://:8080", "has an invalid URL"),
        ("http://user:SECRET@", "has an invalid URL"),
        ("socks5://127.0.0.1:1", "SOCKS"),
    ],
)
def test_proxy_that_cannot_be_used(origin, cache, monkeypatch, proxy, text):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(rankload.FetchError, match=f"the proxy that the environment names .*{text}"):
        rankload.dist_fetch("http://behind-the-proxy.invalid/model.bin", cache)


def test_proxy_from_the_environment(cache, monkeypatch):
    """A plain HTTP proxy is asked with the full URL: an origin can play one."""
    with Origin() as proxy:
        proxy.add("model.bin", b"through the proxy")
        monkeypatch.setenv("http_proxy", proxy.base_url)
        path = rankload.dist_fetch("http://behind-the-proxy.invalid/model.bin", cache)
        assert path.read_bytes() == b"through the proxy"
        assert proxy.requests()[0].headers["host"] == "behind-the-proxy.invalid"


def test_signed_url_with_changing_signatures_is_one_file(origin, cache, caplog):
    url = origin.add("model.bin", b"content")
    signed = [
        f"{url}?X-Amz-Signature=aa&X-Amz-Date=1&X-Amz-Expires=60",
        f"{url}?X-Amz-Signature=bb&X-Amz-Date=2&X-Amz-Expires=90",
        f"{url}?sv=2020&se=2031&sr=b&sp=r&sig=cc",
        f"{url}?Expires=1&Signature=dd&Key-Pair-Id=ee",
        f"{url}?token=ff",
    ]
    paths = {rankload.dist_fetch(one, cache) for one in signed}
    assert len(paths) == 1
    assert origin.request_count() == 1


def test_query_that_is_no_signature_is_another_file(origin, cache):
    url = origin.add("model.bin", b"content")
    paths = {rankload.dist_fetch(f"{url}?{query}", cache) for query in ("versionId=1", "versionId=2")}
    assert len(paths) == 2
    assert origin.request_count() == 2


def test_threads_of_one_process_download_once(origin, cache, big_content):
    from concurrent.futures import ThreadPoolExecutor

    url = origin.add("file.bin", big_content)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: rankload.dist_fetch(url, cache), range(4)))
    assert {path.read_bytes() for path in paths} == {big_content}
    assert origin.request_count() == 1


def test_reply_order_is_the_mirrors_order(origin, cache):
    first = origin.add("a.bin", b"first", Reply())
    second = origin.add("b.bin", b"second")
    assert rankload.dist_fetch([first, second], cache).read_bytes() == b"first"
    assert origin.request_count("b.bin") == 0


def test_fetch_needs_no_checkpoint(origin, cache):
    url = origin.add("page.html", b"", Reply.html_page())
    [result] = run_ranks(fetch, 1, env="none", args=(url, cache))
    assert result.value == str(cache / "page.html")
