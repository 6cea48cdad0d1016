"""Tokens and headers go to the host that they are for, and to no other; none comes out in a log or a record."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

import rankload
from harness.certificates import Authority
from harness.namespace import namespace
from harness.nginx import nginx
from harness.nginx_behaviours import redirect_to
from harness.origin import Origin
from harness.replies import Reply

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

CONTENT = bytes(range(256)) * 1000
SECRETS = {"GH_TOKEN": "SECRET-GH", "HF_TOKEN": "SECRET-HF"}

# Every logger of the process is on, urllib3's and requests' too.
FETCH = """
import logging, sys, rankload
logging.basicConfig(level=logging.DEBUG)
print(rankload.dist_fetch(sys.argv[1], sys.argv[2]).stat().st_size)
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "file.bin").write_bytes(CONTENT)
    return folder


@pytest.fixture
def elsewhere():
    with Origin() as server:
        yield server


def texts_in(directory):
    return "".join(str(path) + path.read_bytes().decode(errors="replace") for path in Path(directory).rglob("*.json"))


def authorizations(server, count=1):
    return [access.authorization for access in server.wait_for_accesses(count)]


@needs_root
@pytest.mark.parametrize(
    ("host", "expected"),
    [("github.com", "Bearer SECRET-GH"), ("huggingface.co", "Bearer SECRET-HF"), ("other.org", "")],
)
def test_token_goes_to_its_host_and_not_where_it_redirects(root, tmp_path, cache, host, expected):
    authority = Authority(tmp_path)
    with (
        namespace({host: "127.0.0.1", "cdn.example": "127.0.0.2"}) as network,
        nginx(root, redirect_to("https://cdn.example"), tls=authority.certificate(host), port=443,
              start=network.start_program) as server,
        nginx(root, tls=authority.certificate("cdn.example"), address="127.0.0.2", port=443,
              start=network.start_program) as cdn,
    ):  # fmt: skip
        url = f"https://{host}/file.bin?X-Amz-Signature=SECRET"
        result = network.run_script(FETCH, url, cache, env={**authority.environment, **SECRETS}).check()
        assert authorizations(server) == [expected]
        assert authorizations(cdn) == [""]
    assert result.stdout == f"{len(CONTENT)}\n"
    assert "urllib3" in result.stderr and "SECRET" not in result.stderr + texts_in(cache)


@needs_root
@pytest.mark.parametrize("host", ["github.com", "huggingface.co"])
def test_token_is_not_sent_in_the_clear(root, cache, host):
    with namespace({host: "127.0.0.1"}) as network, nginx(root, port=80, start=network.start_program) as server:
        network.run_script(FETCH, f"http://{host}/file.bin", cache, env=SECRETS).check()
        assert authorizations(server) == [""]


@needs_root
def test_token_of_a_login(root, tmp_path, cache):
    """As `hf auth login` stores it; no variable is set."""
    authority = Authority(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("SECRET-LOGIN\n")
    with (
        namespace({"huggingface.co": "127.0.0.1"}) as network,
        nginx(root, tls=authority.certificate("huggingface.co"), port=443, start=network.start_program) as server,
    ):
        environment = {**authority.environment, "HF_HOME": str(tmp_path / "hf")}
        result = network.run_script(FETCH, "https://huggingface.co/file.bin", cache, env=environment).check()
        assert authorizations(server) == ["Bearer SECRET-LOGIN"]
    assert "SECRET" not in result.stderr


def test_token_goes_to_an_endpoint_of_ones_own(origin, elsewhere, cache, monkeypatch):
    """Over http, too: it was the user who said so. Not to another port of that host."""
    monkeypatch.setenv("HF_TOKEN", "SECRET-HF")
    monkeypatch.setenv("HF_ENDPOINT", origin.base_url)
    elsewhere.add("blob", CONTENT)
    url = origin.add("file.bin", b"", redirect_to=elsewhere.url("blob"))
    rankload.dist_fetch(url, cache)
    assert origin.requests()[0].headers["authorization"] == "Bearer SECRET-HF"
    assert "authorization" not in elsewhere.requests()[0].headers


def test_token_is_not_sent_to_any_host(origin, cache, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    rankload.dist_fetch(origin.add("file.bin", CONTENT), cache)
    assert "authorization" not in origin.requests()[0].headers


def test_header_of_the_caller_wins_over_a_token(origin, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "SECRET-HF")
    monkeypatch.setenv("HF_ENDPOINT", origin.base_url)
    rankload.dist_fetch(origin.add("file.bin", CONTENT), cache, headers={"authorization": "Bearer mine"})
    assert origin.requests()[0].headers["authorization"] == "Bearer mine"


def test_headers_of_the_caller_stay_with_their_host(origin, elsewhere, cache):
    """All of them: nobody knows which one is a key. On the way back to the first host they are there again."""
    headers = {"Authorization": "Bearer SECRET", "X-Api-Key": "SECRET"}
    origin.add("blob", CONTENT)
    elsewhere.add("hop", b"", redirect_to=origin.url("blob"))
    url = origin.add("file.bin", b"", redirect_to=elsewhere.url("hop"))
    assert rankload.dist_fetch(url, cache, headers=headers).read_bytes() == CONTENT
    [hop] = elsewhere.requests()
    assert "authorization" not in hop.headers and "x-api-key" not in hop.headers
    assert {request.headers.get("x-api-key") for request in origin.requests()} == {"SECRET"}


def test_headers_of_the_caller_stay_with_their_host_for_all_ranges(origin, elsewhere, cache, big_content, monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", "500000")
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")
    elsewhere.add("blob", big_content)
    url = origin.add("file.bin", b"", redirect_to=elsewhere.url("blob"))
    rankload.dist_fetch(url, cache, headers={"X-Api-Key": "SECRET"})
    assert elsewhere.request_count() > 3
    assert not any("x-api-key" in request.headers for request in elsewhere.requests())


def test_headers_of_the_caller_are_not_for_mirrors(origin, elsewhere, cache):
    first = origin.add("file.bin", b"", status=404)
    second = elsewhere.add("file.bin", CONTENT)
    rankload.dist_fetch([first, second], cache, headers={"X-Api-Key": "SECRET"})
    assert origin.requests()[0].headers["x-api-key"] == "SECRET"
    assert "x-api-key" not in elsewhere.requests()[0].headers


def test_headers_and_tokens_for_the_sidecar(origin, cache):
    """It lies beside the file, so that whoever may have the one may have the other."""
    import hashlib

    wanted = {"required_headers": {"X-Api-Key": "SECRET"}}
    url = origin.add("file.bin", CONTENT, **wanted)
    origin.add("file.bin.sha256", hashlib.sha256(CONTENT).hexdigest().encode(), **wanted)
    rankload.dist_fetch(url + "?sig=SECRET", cache, sidecar=True, headers={"X-Api-Key": "SECRET"})
    assert [request.query for request in origin.requests()] == ["sig=SECRET"] * 2


def test_nothing_secret_in_any_log(origin, elsewhere, cache, caplog):
    """Every logger is on. urllib3 would show the full URL of each request, and warns of broken headers with it."""
    elsewhere.add("blob", CONTENT, Reply(status=503), Reply(headers={"X-Bad\x00Name": "x"}))
    url = origin.add("file.bin", b"", redirect_to=elsewhere.url("blob") + "?sig=SECRET")
    with caplog.at_level(logging.DEBUG):
        rankload.dist_fetch(url.replace("//", "//user:SECRET@") + "?sig=SECRET", cache, headers={"X-Api-Key": "SECRET"})
    assert "GET /file.bin?… HTTP/1.1" in caplog.text and "GET /blob?… HTTP/1.1" in caplog.text
    assert "Failed to parse headers" in caplog.text
    assert "SECRET" not in caplog.text + texts_in(cache)


def test_log_of_others_is_left_alone(origin, cache, caplog):
    import requests

    rankload.dist_fetch(origin.add("file.bin", CONTENT), cache)
    with caplog.at_level(logging.DEBUG):
        requests.get(origin.url("file.bin") + "?page=2", timeout=10)
    assert "GET /file.bin?page=2 HTTP/1.1" in caplog.text
