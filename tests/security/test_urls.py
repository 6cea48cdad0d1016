"""URLs that two parsers read differently, and what of a URL may be seen or decides which file it is."""

from __future__ import annotations

import traceback

import pytest

import rankload
import rankload.hub
from harness.fetch_calls import files_in
from rankload._coordination.disagreement import describe_disagreement
from rankload._fetch.request import agreed_arguments, make_request
from rankload._settings import Settings
from rankload._urls import redact, server_of, url_key, why_refused

AMBIGUOUS = [
    "https://:@evil.test\\@good.test/x",
    "https://evil.test\\.good.test/x",
    "https://good.test\\@evil.test/x",
    "https:\\\\good.test/x",
    "https:/good.test/x",
    "https:good.test/x",
    "https:///good.test/x",
    "https://good.test /x",
    "https://good.test/a b",
    "https://good.test/a\tb",
    "https://good.test\n.evil.test/x",
    "https://good.test/x\r\nHost: evil.test",
    "https://good.test\x00.evil.test/x",
    "https://good.test\u2028/x",
    "https://a@b@good.test/x",
    "https://good.test:80:443/x",
    "https://[::1/x",
    "https://::1/x",
    "https://good.test%2eevil.test/x",
    "https://good.test%00.evil.test/x",
    "https://good.test:99999999/x",
    "https://@/x",
]


@pytest.mark.fault(63)
@pytest.mark.parametrize("url", AMBIGUOUS)
def test_ambiguous_url_is_nobodys_and_is_refused(url, cache):
    assert server_of(url) is None
    with pytest.raises(rankload.ArgumentError):
        rankload.dist_fetch(url, cache, headers={"Authorization": "SECRET"})
    with pytest.raises(rankload.ArgumentError):
        rankload.open_checkpoint(url)
    assert not cache.exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://good.test/x",
        "https://user:pa%40ss@good.test:8443/x?a=b#c",
        "http://[::1]:80/x",
        "https://bücher.test/ü",
    ],
)
def test_plain_url_is_not_refused(url):
    assert why_refused(url) is None and server_of(url) is not None


@pytest.mark.fault(71)
@pytest.mark.parametrize(
    ("one", "other"),
    [  # what merely looks like a signature says which file it is
        ("http://host/get?tokenizer=a", "http://host/get?tokenizer=b"),
        ("http://host/get?author=a", "http://host/get?author=b"),
        ("http://host/get?authority=a", "http://host/get?authority=b"),
        ("http://host/get?num_tokens=1", "http://host/get?num_tokens=2"),
        ("http://host/get?secretary=a", "http://host/get?secretary=b"),
        ("http://host/get?x-oss-process=a", "http://host/get?x-oss-process=b"),
        ("http://host/get?sr=a&sp=b", "http://host/get?sr=c&sp=b"),
        ("http://host/get?se=1", "http://host/get?se=2"),
        ("http://host/get?st=1", "http://host/get?st=2"),
        ("http://host/get?sv=1", "http://host/get?sv=2"),
        ("http://host/get?policy=ppo", "http://host/get?policy=sac"),
        ("http://host/get?expires=1", "http://host/get?expires=2"),
        ("http://host/get?signature=a", "http://host/get?signature=b"),
        ("http://host/get?sig=a", "http://host/get?sig=b"),
        ("http://host/get?x-amz-meta-model=a", "http://host/get?x-amz-meta-model=b"),
        ("http://host/get?X-Amz-Date=1", "http://host/get?X-Amz-Date=2"),
        # the rest keeps its bytes and their order
        ("http://host/get?a=1&b=2", "http://host/get?b=2&a=1"),
        ("http://host/get?a=%2F", "http://host/get?a=/"),
        ("http://host/get?a+b", "http://host/get?a%20b"),
        ("http://host/get?a&", "http://host/get?a"),
        ("http://host/get?file=a&sig=x&sv=1", "http://host/get?file=b&sig=x&sv=1"),
        ("http://host/a;v=1", "http://host/a;v=2"),
        # a semicolon separates parameters, too
        ("http://host/get?token=x;file=a", "http://host/get?token=x;file=b"),
        ("http://host/get?sv=1&sig=x;file=a", "http://host/get?sv=1&sig=x;file=b"),
        # a name alone authorises nothing
        ("http://host/get?token", "http://host/get?jwt"),
        # only on the web is there a query: here it is a part of the name
        ("s3://bucket/get?token=a", "s3://bucket/get?token=b"),
        ("memory://get?sig=a&sv=1", "memory://get?sig=b&sv=1"),
        ("s3://bucket/get?", "s3://bucket/get"),
    ],
)
def test_different_files_have_different_keys(one, other):
    assert url_key(one) != url_key(other)


@pytest.mark.fault(71)
def test_two_files_that_only_an_innocent_parameter_tells_apart(origin, cache):
    """Each load gets its own; the second one is kept beside the first."""
    url = origin.add("get", b"one")
    first = rankload.dist_fetch(f"{url}?tokenizer=a", cache)
    origin.add("get", b"another")
    second = rankload.dist_fetch(f"{url}?tokenizer=b", cache)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"another")


@pytest.mark.parametrize(
    "signed",
    [
        "X-Amz-Algorithm=a&X-Amz-Credential={0}&X-Amz-Date={0}&X-Amz-Expires=9&X-Amz-SignedHeaders=h&X-Amz-Signature={0}",
        "X-Goog-Algorithm=a&X-Goog-Credential={0}&X-Goog-Date={0}&X-Goog-Expires=9&X-Goog-Signature={0}",
        "AWSAccessKeyId={0}&Signature={0}&Expires={0}",
        "GoogleAccessId={0}&Signature={0}&Expires={0}",
        "Expires={0}&Signature={0}&Key-Pair-Id={0}",
        "Policy={0}&Signature={0}&Key-Pair-Id={0}",
        "sv=2024&st={0}&se={0}&sr=b&sp=r&sig={0}&skoid={0}",
        "x-oss-signature-version=4&x-oss-credential={0}&x-oss-date={0}&x-oss-expires={0}&x-oss-signature={0}",
        "token={0}",
        "access_token={0}",
    ],
)
def test_signed_url_is_the_same_file_the_next_day(signed):
    keys = {url_key(f"http://host/m.pth?versionId=7&{signed.format(day)}") for day in ("Mon", "Tue")}
    assert keys == {url_key("http://host/m.pth?versionId=7")}


@pytest.mark.parametrize(
    "url",
    [
        *AMBIGUOUS,
        "file://user:SECRET@host/m.pth",
        "file:///m.pth?SECRET",
        "https:/user:SECRET@host/m.pth",
        "https:user:SECRET@host/m.pth",
        "https://user:SECRET@host/m.pth",
        "https://user:SECRET@host:x/m.pth",
        "https://user:SEC\\RET@host/m.pth",
        "https://SECRET@host/m.pth?SECRET#SECRET",
        "HTTPS://user:SECRET@HOST/m.pth",
        "s3://key:SECRET@bucket/m.pth",
        "s3:/key:SECRET@bucket/m.pth",
        "s3://key:SEC/RET@bucket/m.pth",
        "zip://m.pth::https://user:SECRET@host/m.zip",
        "zip://folder/m.pth::https://user:SECRET@host/m.zip?SECRET",
        "simplecache::s3://key:SEC/RET@bucket/m.pth",
        "http://host/m.pth\x1b[2J\n\u202e",
        " https://user:SECRET@host/m.pth?SECRET",
        "host.example/m.pth?SECRET",
        "user:SECRET@host/m.pth",
        "//user:SECRET@host.example/m.pth",
    ],
)
def test_redacted_url_is_printable_and_has_no_secret(url):
    shown = redact(url)
    assert shown.isprintable() and "SECRET" not in shown and "RET@" not in shown


CALLS = [
    rankload.dist_fetch,
    rankload.load,
    rankload.open_checkpoint,
    lambda url: rankload.dist_fetch(url, sidecar=True),
    lambda url: rankload.hub.download_url_to_file(url, "copy", progress=False),
]


def expect_no_secret(error):
    assert "SECRET" not in "".join(traceback.format_exception_only(error)) + repr(vars(error))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "url",
    [
        "host.example/m.pth?SECRET",
        "user:SECRET@host.example/m.pth",
        "u:SECRET@host:8000/m",
        "u:SECRET@host/m",
        "//u:SECRET@host/m",
        "//host.example/m.pth?SECRET",
    ],
)
def test_url_without_a_scheme_is_shown_without_its_secrets(url, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rankload.CacheError, match="if a URL is meant, write https://host") as caught:
        call(url)
    expect_no_secret(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", [" ", "\n", "\ufeff", "'", "<", "url=", "-"])
def test_url_after_something_else_is_shown_without_its_secrets(before, call, tmp_path, monkeypatch):
    """Such as a blank, or what an editor has put at the beginning of a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rankload.CacheError, match="if a URL is meant, remove what stands before it") as caught:
        call(f"{before}https://user:SECRET@host/m.pth?sig=SECRET/{'SECRET' * 100}")
    expect_no_secret(caught.value)


def test_disagreement_of_ranks_shows_no_query_of_a_url_without_a_scheme(tmp_path):
    requests = [make_request(f"host.example/m.pth?SECRET{rank}", tmp_path, Settings()) for rank in range(2)]
    first, other = (agreed_arguments(request, "fetch") for request in requests)
    assert "SECRET" not in describe_disagreement(first, 0, other, 1)


def test_complaint_about_a_hash_prefix_shows_no_query(cache):
    with pytest.raises(rankload.ArgumentError, match="has no hash prefix") as caught:
        rankload.dist_fetch("host.example/m.pth?SECRET", cache, check_hash=True)
    expect_no_secret(caught.value)


def test_path_that_looks_like_a_url_is_one_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("host.example/m.pth", "mirror/https:/host/m.pth"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"file")
    for path in ("host.example/m.pth", "mirror/https://host/m.pth"):
        assert rankload.dist_fetch(path).read_bytes() == b"file"


@pytest.mark.parametrize("name", ["/.rankload", "/.RANKLOAD", "/a/.rankload?x", "/.."])
def test_url_cannot_take_the_place_of_rankloads_own_directory(origin, cache, name):
    with pytest.raises(rankload.ArgumentError):
        rankload.dist_fetch(origin.base_url + name, cache)
    assert files_in(cache) == []
