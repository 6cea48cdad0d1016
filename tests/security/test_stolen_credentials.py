"""Headers, tokens and netrc entries go to the server that is really connected to, or nowhere."""

from __future__ import annotations

import os
import socket
import traceback

import pytest

import rankload
from harness.certificates import Authority
from harness.namespace import namespace
from harness.nginx import nginx
from harness.nginx_behaviours import Behaviour
from harness.origin import Origin
from harness.ranks import run_ranks
from harness.raw_origin import RawOrigin
from rankload._fetch.origins.filesystem import wrap_any_errors

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

CONTENT = bytes(range(256)) * 100
SECRETS = {"GH_TOKEN": "SECRET-GH", "HF_TOKEN": "SECRET-HF"}

FETCH = """
import sys, rankload
try:
    print(rankload.dist_fetch(sys.argv[1], sys.argv[2], progress=False).stat().st_size)
except rankload.FetchError as error:
    print("refused:", error)
"""


@pytest.fixture
def elsewhere():
    with Origin() as server:
        yield server


def redirect_from_start(location):
    # not by add_header: nginx would send an empty Location before it, and together they are malformed
    quoted = location.replace("\\", "\\\\")
    return Behaviour(f'location = /start.bin {{ absolute_redirect off; return 302 "{quoted}"; }}')


@pytest.mark.fault(63)
@needs_root
@pytest.mark.parametrize("location", ["https://{}/file.bin", "//{}/file.bin", "https://HUGGINGFACE.CO:443/file.bin"])
def test_redirect_to_the_tokens_own_host_gets_it(tmp_path, cache, location):
    """So that what follows shows something: it is the host that decides."""
    authority, root, victim = Authority(tmp_path), tmp_path / "root", "huggingface.co"
    root.mkdir()
    (root / "file.bin").write_bytes(CONTENT)
    with (
        namespace({"start.example": "127.0.0.1", victim: "127.0.0.3"}) as network,
        nginx(root, redirect_from_start(location.format(victim)), tls=authority.certificate("start.example"), port=443,
              start=network.start_program) as start,
        nginx(root, tls=authority.certificate(victim), address="127.0.0.3", port=443,
              start=network.start_program) as own,
    ):  # fmt: skip
        environment = {**authority.environment, **SECRETS}
        network.run_script(FETCH, "https://start.example/start.bin", cache, env=environment).check()
        assert [access.authorization for access in own.accesses()] == ["Bearer SECRET-HF"]
        assert not any(access.authorization for access in start.accesses())


@pytest.mark.fault(63)
@needs_root
@pytest.mark.parametrize("victim", ["huggingface.co", "github.com"])
@pytest.mark.parametrize(
    "location",
    [
        "https://:@evil.example\\@{}/file.bin",
        "https://evil.example\\@{}/file.bin",
        "https://evil.example\\.{}/file.bin",
        "https://evil.example#@{}/file.bin",
        "https://evil.example?@{}/file.bin",
        "https://{}:x@evil.example/file.bin",
        "https://{}@evil.example/file.bin",
        "//{}@evil.example/file.bin",
        "https:\\\\evil.example\\@{}/file.bin",
        "https://evil.example/@{}/../file.bin",
        "https://evil.example/file.bin",
    ],
)
def test_no_redirect_gets_a_token(tmp_path, cache, origin, victim, location):
    """evil.example has a certificate, and is trusted: only the choice of credentials protects them."""
    authority, root = Authority(tmp_path), tmp_path / "root"
    root.mkdir()
    (root / "file.bin").write_bytes(CONTENT)
    with (
        namespace({"start.example": "127.0.0.1", "evil.example": "127.0.0.2", victim: "127.0.0.3"}) as network,
        nginx(root, redirect_from_start(location.format(victim)), tls=authority.certificate("start.example"), port=443,
              start=network.start_program),
        nginx(root, tls=authority.certificate("evil.example"), address="127.0.0.2", port=443,
              start=network.start_program) as evil,
    ):  # fmt: skip
        environment = {**authority.environment, **SECRETS}
        result = network.run_script(FETCH, "https://start.example/start.bin", cache, env=environment).check()
        seen = [access.authorization for access in evil.accesses()]
    assert not any(seen), (seen, result.stdout)
    assert seen or "refused: https://start.example/start.bin: it redirects to" in result.stdout
    assert "SECRET" not in result.stdout + result.stderr


@pytest.mark.fault(63)
@pytest.mark.parametrize(
    "location",
    [
        "http://{other}\\@{own}/blob",
        "http://:@{other}\\@{own}/blob",
        "http://{own}@{other}/blob",
        "http://user:password@{own}/blob",
        "http://{own}\\@{other}/blob",
        "/blob\\..\\x",
        "/blob x",
        "/blob\tx",
        "http:/{other}/blob",
        "http:///{other}/blob",
        "ftp://{own}/blob",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://{own}:99999/blob",
        "http://[{own}/blob",
    ],
)
def test_strange_redirect_is_refused_or_harmless(origin, elsewhere, cache, location):
    origin.add("blob", CONTENT)
    elsewhere.add("blob", CONTENT)
    own, other = (server.base_url.removeprefix("http://") for server in (origin, elsewhere))
    url = origin.add("file.bin", b"", redirect_to=location.format(own=own, other=other))
    with pytest.raises(rankload.FetchError):
        rankload.dist_fetch(url, cache, headers={"Authorization": "Bearer SECRET", "X-Key": "SECRET"}, progress=False)
    assert elsewhere.request_count() == 0


@pytest.mark.fault(63)
def test_netrc_entry_is_not_for_a_host_that_a_redirect_names(origin, elsewhere, cache, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login somebody password SECRET\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    elsewhere.add("blob", CONTENT)
    url = origin.add("file.bin", b"", redirect_to=elsewhere.url("blob"))
    rankload.dist_fetch(url, cache)
    assert origin.requests()[0].headers["authorization"].startswith("Basic ")
    assert "authorization" not in elsewhere.requests()[0].headers


@pytest.mark.fault(63)
def test_user_of_the_url_is_not_for_a_host_that_a_redirect_names(origin, elsewhere, cache):
    elsewhere.add("blob", CONTENT)
    url = origin.add("file.bin", b"", redirect_to=elsewhere.url("blob"))
    rankload.dist_fetch(url.replace("//", "//user:SECRET@"), cache)
    assert origin.requests()[0].headers["authorization"].startswith("Basic ")
    assert "authorization" not in elsewhere.requests()[0].headers


@pytest.mark.fault(63)
def test_cookie_of_a_login_is_not_for_another_port(origin, elsewhere, cache):
    """Nor is one that names its domain; but a redirect within the server gets both."""
    elsewhere.add("blob", CONTENT)
    within = origin.add("within.bin", b"", redirect_to=elsewhere.url("blob"))

    def log_in(connection):
        requests.append(connection.read_request())
        connection.sendall(
            b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n"
            b"Set-Cookie: session=SECRET; Path=/\r\nSet-Cookie: other=SECRET; Domain=127.0.0.1\r\n\r\n"
        )
        requests.append(connection.read_head())
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {within}\r\nContent-Length: 0\r\n\r\n".encode())

    requests: list[str] = []
    with RawOrigin(log_in) as own:
        rankload.dist_fetch(own.url("file.bin"), cache, progress=False)
    assert "session=SECRET" in requests[1] and "other=SECRET" in requests[1]
    for server in (origin, elsewhere):
        assert server.request_count() > 0
        assert not any("cookie" in request.headers for request in server.requests())


@pytest.mark.fault(63)
def test_host_of_another_alphabet_gets_what_is_its_own(origin, cache, monkeypatch):
    """Its name is asked in ASCII."""
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: known("127.0.0.1", *rest, **more))
    origin.add("file.bin", CONTENT)
    url = origin.url("file.bin").replace("127.0.0.1", "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.test")
    rankload.dist_fetch(url.replace("//", "//user:password@"), cache, headers={"X-Key": "key"}, progress=False)
    headers = origin.requests()[0].headers
    assert headers["host"].startswith("xn--bcher-kva.test:")
    assert headers["x-key"] == "key" and headers["authorization"].startswith("Basic ")


def everything_in(error: BaseException | None, seen: set[int]) -> str:
    """All texts of an error and of what it is chained to, shown or not."""
    if error is None or id(error) in seen:
        return ""
    seen.add(id(error))
    own = "".join(map(str, (error, error.args, vars(error))))
    return own + everything_in(error.__cause__, seen) + everything_in(error.__context__, seen)


@pytest.mark.parametrize("error", [OSError, ValueError, KeyError, PermissionError, FileNotFoundError])
def test_no_error_of_a_filesystem_leads_to_the_full_url(error):
    with pytest.raises(rankload.FetchError) as caught, wrap_any_errors("s3://b/m?sig=SECRET", "s3://b/m?…"):
        raise error("GET https://b.example/m?sig=SECRET failed")
    assert "SECRET" not in everything_in(caught.value, set())


@pytest.mark.parametrize("how", ["refused", "reset", "redirect", "status"])
def test_no_error_leads_to_the_full_url(origin, cache, how, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    behaviour = {
        "reset": {"truncate_at": 10},
        "redirect": {"redirect_to": "http://[/?SECRET"},
        "status": {"status": 403},
    }
    url = origin.add("file.bin", CONTENT, **behaviour.get(how, {}))
    if how == "refused":
        url = "http://127.0.0.1:1/file.bin"
    secret_url = url.replace("//", "//user:SECRET@") + "?sig=SECRET"
    for call in (
        lambda url: rankload.dist_fetch(url, cache, progress=False),
        lambda url: rankload.dist_fetch(url, cache, sidecar=True, progress=False),
        rankload.open_checkpoint,
    ):
        with pytest.raises(rankload.RankloadError) as caught:
            call(secret_url)
        assert "SECRET" not in everything_in(caught.value, set())
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("answer", ["404 No such file: {}", "206 Partial\r\nContent-Range: {}"])
def test_server_that_repeats_the_url_gets_no_query_into_an_error(cache, answer):
    def reply(connection):
        asked = connection.read_request().split()[1]
        if "redirect" in asked:
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /file.bin?sig=SECRET\r\nContent-Length: 0\r\n\r\n")
            asked = connection.read_request().split()[1]
        connection.sendall(f"HTTP/1.1 {answer.format(asked)}\r\nContent-Length: 0\r\n\r\n".encode())

    with RawOrigin(reply) as origin:
        for url in ("file.bin?sig=SECRET", "redirect.bin"):
            with pytest.raises(rankload.FetchError, match=r"file\.bin\?…") as caught:
                rankload.dist_fetch(origin.url(url), cache, progress=False)
            assert "SECRET" not in everything_in(caught.value, set())


@pytest.mark.parametrize(
    "url",
    [
        "memory://key:SECRET@bucket/x.pth?SECRET",
        "hf://key:SECRET@x/y.pth",
        "s3://key:SECRET@bucket/x.pth",
        "s3://key:%53ECRET@bucket/x.pth",
        "s3://bucket/x.pth?versionId=SECRET",
    ],
)
def test_no_error_of_a_filesystem_shows_a_secret_or_leads_to_one(cache, url, monkeypatch):
    """Libraries take a user and password for the name of a bucket, and show it."""
    pytest.importorskip({"s3": "s3fs", "hf": "huggingface_hub"}.get(url.partition(":")[0], "fsspec"))
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for call in (lambda: rankload.dist_fetch(url, cache, progress=False), lambda: rankload.open_checkpoint(url)):
        with pytest.raises(rankload.FetchError) as caught:
            call()
        assert "SECRET" not in everything_in(caught.value, set())
        assert caught.value.__context__ is None


def context_of_the_hubs_error(rank, call, url):
    with pytest.raises(rankload.FetchError) as caught:
        getattr(rankload, call)(url)
    return repr(caught.value.__context__) + everything_in(caught.value, set())


@pytest.mark.parametrize(
    ("call", "url"),
    [
        ("dist_fetch", "hf://a/b"),
        ("open_checkpoint", "hf://a/b"),
        ("dist_fetch", "hf://a/b/c"),
        ("dist_snapshot", "a/b"),
    ],
)
def test_no_error_of_the_hub_leads_to_a_request_with_the_token(origin, tmp_path, call, url):
    endpoint = origin.base_url.replace("//", "//user:SECRET@")
    variables = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_SECRET", "HF_HOME": str(tmp_path), "RANKLOAD_RETRIES": "0"}
    [result] = run_ranks(context_of_the_hubs_error, 1, args=(call, url), rank_env={0: variables})
    assert result.value.startswith("None") and "SECRET" not in result.value


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization: Bearer SECRET\n": ""},
        {"Authorization: Bearer SECRET": ""},
        {"Authorization": "SECRET\n"},
        {"Authorization": " SECRET"},
        {b"Authorization: SECRET": "x"},
        {"Authorization": b"SECRET"},
        {"=SECRET": "x", ":SECRET": ""},
    ],
)
def test_complaint_about_headers_shows_no_secret(cache, headers):
    """Whatever is wrong about them: a value may stand in the name."""
    for call in (
        lambda: rankload.dist_fetch("https://good.test/x", cache, headers=headers),
        lambda: rankload.open_checkpoint("https://good.test/x", headers=headers),
    ):
        with pytest.raises(rankload.ArgumentError) as caught:
            call()
        assert "SECRET" not in everything_in(caught.value, set())


@pytest.mark.parametrize("token", ["hf_SECRET\n", " hf_SECRET", "hf_SECRET\N{SNOWMAN}"])
def test_complaint_about_a_token_shows_nothing_of_it(tmp_path, token):
    with pytest.raises(rankload.ArgumentError, match="token: expected printable ASCII text") as caught:
        rankload.dist_snapshot("org/tiny", token=token, cache_dir=tmp_path)
    assert "SECRET" not in everything_in(caught.value, set())
