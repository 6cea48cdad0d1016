"""The network below HTTP: connections that stall, trickle or break, proxies, TLS, addresses that lead nowhere."""

from __future__ import annotations

import os
import subprocess

import pytest

import rankload
from harness import hf
from harness.certificates import Authority
from harness.chaos import Fault, chaos
from harness.fetch_calls import errors_of, expect, fetch, files_in, ranges_asked, whole_log
from harness.namespace import BLACK_HOLE_IPV4, BLACK_HOLE_IPV6, namespace
from harness.nginx import nginx
from harness.nginx_behaviours import redirect_to
from harness.ports import reserved_port
from harness.ranks import run_ranks
from harness.replies import Reply
from harness.squid import squid

CHUNK = 1 << 20

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")


@pytest.fixture(autouse=True)
def _small_and_impatient(monkeypatch):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(CHUNK))
    monkeypatch.setenv("RANKLOAD_WHOLE_FIRST", "0")  # one answer to the first request would be all there is to see
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "0.4")
    monkeypatch.setenv("RANKLOAD_HEARTBEAT_SECONDS", "0.2")


@pytest.fixture
def one_stream(monkeypatch):
    monkeypatch.setenv("RANKLOAD_STREAMS", "1")


@pytest.fixture
def root(tmp_path, big_content):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "file.bin").write_bytes(big_content)
    return folder


@pytest.fixture
def authority(tmp_path, monkeypatch):
    made = Authority(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def expect_fetched(results, cache, content):
    assert {result.value for result in results} == {str(cache / "file.bin")}
    assert (cache / "file.bin").read_bytes() == content


@pytest.mark.fault(14)
@pytest.mark.parametrize("behaviour", [{"hold_at": 300_000}, {"hold_before_reply": True}, {"hold_at": 0}])
def test_stalled_connection_is_replaced(origin, cache, big_content, one_stream, behaviour):
    """The next one goes on where it got, and no byte comes twice."""
    url = origin.add("file.bin", big_content, Reply(), Reply(**behaviour), Reply())
    results = run_ranks(fetch, 2, args=(url, cache))
    expect_fetched(results, cache, big_content)
    held_at = CHUNK + behaviour.get("hold_at", 0)
    assert ranges_asked(origin)[2].startswith(f"bytes={held_at}-")
    assert origin.bytes_sent() == len(big_content)
    assert results[0].seconds < 25  # the default would be 30


@pytest.mark.fault(14)
def test_connection_that_falls_silent_below_http(root, cache, big_content, one_stream):
    with nginx(root) as server, chaos(server.port, Fault(stall_at=3 * CHUNK), Fault()) as link:
        assert rankload.dist_fetch(link.through(server.url("file.bin")), cache).read_bytes() == big_content
        assert len(link.connections) == 2
        assert sum(connection.bytes_down for connection in link.connections) < len(big_content) + 20_000


@pytest.mark.fault(14)
def test_one_of_several_streams_stalls(root, cache, big_content):
    """The others go on meanwhile."""
    slow = Fault(bytes_per_second=3e6)
    with nginx(root) as server, chaos(server.port, slow, Fault(stall_at=CHUNK // 2), slow) as link:
        assert rankload.dist_fetch(link.through(server.url("file.bin")), cache).read_bytes() == big_content
        assert len(link.connections) > 2


@pytest.mark.fault(14)
def test_origin_that_always_stalls(origin, cache, big_content, one_stream, monkeypatch):
    monkeypatch.setenv("RANKLOAD_RETRIES", "2")
    url = origin.add("file.bin", big_content, Reply(), Reply(hold_at=0))
    errors = errors_of(fetch, url, cache)
    expect(errors, rankload.errors.FetchTimeoutError, url, "not a byte came within the deadline", "pass a mirror")
    assert origin.request_count() == 1 + 3


@pytest.mark.fault(15)
def test_trickling_is_no_stall(origin, cache, big_content):
    """Slower than any deadline would allow for the whole, but each byte comes in time."""
    content = big_content[:100_000]
    url = origin.add("file.bin", content, bytes_per_second=40_000)
    results = run_ranks(fetch, 2, args=(url, cache), kwargs={"timeout": 1.0})
    expect_fetched(results, cache, content)
    assert results[0].seconds > 2
    assert origin.request_count() == 1


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    "fault", [Fault(reset_at=3 * CHUNK), Fault(cut_at=3 * CHUNK), Fault(cut_at=0), Fault(reset_at=90)]
)
def test_connection_that_breaks_below_http(root, cache, big_content, one_stream, fault):
    with nginx(root) as server, chaos(server.port, fault, Fault()) as link:
        results = run_ranks(fetch, 2, args=(link.through(server.url("file.bin")), cache))
        expect_fetched(results, cache, big_content)
        assert len(link.connections) == 2
        link.wait_until_closed()
        # a reset drops what is under way; the ranges before that are kept
        kept = CHUNK if fault.reset_at == 3 * CHUNK else fault.cut_at or 0
        assert link.connections[1].bytes_down < len(big_content) - kept + 20_000


@pytest.mark.fault(1)
def test_connection_that_breaks_inside_tls(root, cache, big_content, authority, one_stream):
    with (
        nginx(root, tls=authority.certificate("127.0.0.1")) as server,
        chaos(server.port, Fault(cut_at=3 * CHUNK), Fault(reset_at=2 * CHUNK), Fault()) as link,
    ):
        assert rankload.dist_fetch(link.through(server.url("file.bin")), cache).read_bytes() == big_content
        assert len(link.connections) == 3


@pytest.mark.fault(16)
def test_redirects_in_a_circle(origin, cache):
    origin.add("b.bin", b"", redirect_to="/file.bin?sig=SECRET")
    url = origin.add("file.bin", b"", redirect_to="/b.bin?sig=SECRET")
    errors = errors_of(fetch, url, cache)
    expect(errors, rankload.FetchError, url, "too many redirects")
    assert "SECRET" not in str(errors)
    assert origin.request_count() <= 20
    assert files_in(cache) == []


@pytest.mark.fault(16)
def test_redirect_from_https_to_http(origin, root, cache, authority, big_content):
    origin.add("file.bin", big_content)
    with nginx(root, redirect_to(origin.base_url), tls=authority.certificate("127.0.0.1")) as server:
        url = server.url("file.bin")
        errors = errors_of(fetch, url + "?sig=SECRET", cache)
    expect(errors, rankload.FetchError, url, f"redirects from https to {origin.url('file.bin')}", "could alter")
    assert "SECRET" not in str(errors)
    assert origin.request_count() == 0
    assert files_in(cache) == []


def list_on_the_hub(rank):
    with pytest.raises(rankload.FetchError) as caught:
        rankload.open_checkpoint("hf://org/tiny")
    return str(caught.value)


@pytest.mark.fault(16)
def test_redirect_of_the_hub_from_https_to_http(origin, root, tmp_path, authority):
    """Not only of a file: what the Hub lists decides which commit and which digests are meant."""
    hf.publish(origin, "org/tiny", {"model.safetensors": b"x"})
    with nginx(root, redirect_to(origin.base_url), tls=authority.certificate("127.0.0.1")) as server:
        environment = {**authority.environment, "HF_ENDPOINT": server.url("").rstrip("/"), "HF_HOME": str(tmp_path)}
        [result] = run_ranks(list_on_the_hub, 1, rank_env={0: environment})
    assert result.value.startswith(f"hf://org/tiny: it redirects from https to {origin.base_url}/api/models/org/tiny")
    assert origin.request_count() == 0


def test_redirect_from_http_to_https(root, tmp_path, cache, authority, big_content):
    with (
        nginx(root, tls=authority.certificate("127.0.0.1")) as secure,
        nginx(root, redirect_to(secure.base_url)) as plain,
    ):
        assert rankload.dist_fetch(plain.url("file.bin"), cache).read_bytes() == big_content


@pytest.fixture
def no_certificates(authority, monkeypatch):
    """The environment names none; the authority's are there."""
    for name in authority.environment:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
@pytest.mark.usefixtures("no_certificates")
def test_certificate_of_an_authority_in_the_environment(root, cache, authority, big_content, monkeypatch, variable):
    """requests' own variable, and the one that Python's ssl module, and so torch.hub, goes by."""
    monkeypatch.setenv(variable, str(authority.path))
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
        results = run_ranks(fetch, 2, args=(server.url("file.bin"), cache))
        expect_fetched(results, cache, big_content)


@pytest.mark.usefixtures("no_certificates")
def test_certificate_of_an_unknown_authority(root, cache, authority):
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
        errors = errors_of(fetch, server.url("file.bin"), cache)
        expect(errors, rankload.errors.NetworkError, "certificate verify failed", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.usefixtures("no_certificates")
def test_certificates_that_are_not_there(root, cache, authority, monkeypatch, tmp_path, variable):
    """Environments that somebody has moved set such variables."""
    monkeypatch.setenv(variable, str(tmp_path / "moved.pem"))
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
        expect(errors_of(fetch, server.url("file.bin"), cache), rankload.FetchError, f"{variable}={tmp_path}")
        assert server.accesses() == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SSL_CERT_DIR", "{folder}"), ("SSL_CERT_DIR", "{folder}-not:{folder}"), ("REQUESTS_CA_BUNDLE", "{folder}")],
)
@pytest.mark.usefixtures("no_certificates")
def test_a_folder_of_certificates(root, cache, authority, big_content, monkeypatch, tmp_path, variable, value):
    """Of a list, the second folder counts only by OpenSSL's own reading, as the system's certificates do."""
    (tmp_path / "certificates-not").mkdir()
    folder = tmp_path / "certificates"
    folder.mkdir()
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(authority.path)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (folder / f"{name}.0").write_bytes(authority.path.read_bytes())
    monkeypatch.setenv(variable, value.format(folder=folder))
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
        expect_fetched(run_ranks(fetch, 2, args=(server.url("file.bin"), cache)), cache, big_content)


@pytest.mark.parametrize("kind", ["wrong name", "expired", "unknown authority"])
def test_bad_certificate_is_refused_and_not_tried_again(root, cache, tmp_path, authority, kind):
    certificate = {
        "wrong name": lambda: authority.certificate("elsewhere.example"),
        "expired": lambda: authority.certificate("127.0.0.1", is_expired=True),
        "unknown authority": lambda: Authority(tmp_path / "other").certificate("127.0.0.1"),
    }[kind]()
    with nginx(root, tls=certificate) as server, chaos(server.port) as link:
        url = link.through(server.url("file.bin"))
        errors = errors_of(fetch, url + "?sig=SECRET", cache)
        expect(errors, rankload.errors.NetworkError, url, "certificate verify failed")
        assert "SECRET" not in str(errors)
        assert len(link.connections) == 1
    assert files_in(cache) == []


@pytest.mark.fault(17)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_dead_proxy(cache, monkeypatch, scheme):
    monkeypatch.setenv("RANKLOAD_RETRIES", "1")
    with reserved_port() as port:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:SECRET@127.0.0.1:{port}")
        url = f"{scheme}://origin.invalid/file.bin"
        errors = errors_of(fetch, url + "?sig=SECRET", cache)
    expect(errors, rankload.errors.NetworkError, url, "the proxy that the environment names: connection refused")
    assert "SECRET" not in str(errors)
    assert files_in(cache) == []


def test_proxy_with_a_password(origin, cache, big_content, monkeypatch, caplog):
    url = origin.add("file.bin", big_content)
    with squid("user", "a SECRET") as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        with whole_log(caplog):
            assert rankload.dist_fetch(url, cache).read_bytes() == big_content
        assert {access.user for access in proxy.wait_for_accesses(1)} == {"user"}
    assert all("via" in request.headers for request in origin.requests())
    assert "SECRET" not in caplog.text


def test_tls_through_a_proxy_with_a_password(root, cache, big_content, authority, monkeypatch):
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server, squid("user", "a SECRET") as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        results = run_ranks(fetch, 2, args=(server.url("file.bin"), cache))
        expect_fetched(results, cache, big_content)
        assert {access.method for access in proxy.wait_for_accesses(1)} == {"CONNECT"}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_wants_another_password(origin, cache, big_content, monkeypatch, scheme):
    url = origin.add("file.bin", big_content).replace("http:", f"{scheme}:")
    with squid("user", "right") as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:SECRET@127.0.0.1:{proxy.port}")
        errors = errors_of(fetch, url, cache)
    expect(errors, rankload.FetchError, url, "407", "proxy")
    assert "SECRET" not in str(errors)
    assert origin.request_count() == 0


FETCH = """
import sys, time, rankload
began_at = time.monotonic()
try:
    print(rankload.dist_fetch(sys.argv[1], sys.argv[2]).stat().st_size)
except rankload.FetchError as error:
    print(type(error).__name__, error)
print(time.monotonic() - began_at)
"""


@needs_root
@pytest.mark.fault(17)
def test_ipv6_leads_nowhere(root, cache, big_content):
    with (
        namespace({"origin.example": [BLACK_HOLE_IPV6, "127.0.0.1"]}) as network,
        nginx(root, port=80, start=network.start_program),
    ):
        environment = {"RANKLOAD_CONNECT_SECONDS": "0.5"}
        result = network.run_script(FETCH, "http://origin.example/file.bin", cache, env=environment).check()
        size, seconds = result.stdout.split()
        assert int(size) == len(big_content)
        assert float(seconds) >= 0.5


@needs_root
@pytest.mark.fault(17)
@pytest.mark.parametrize("culprit", ["origin", "proxy"])
def test_attempt_to_connect_has_a_deadline_of_its_own(cache, culprit):
    environment = {"RANKLOAD_CONNECT_SECONDS": "0.3", "RANKLOAD_RETRIES": "1"}
    url = f"http://{BLACK_HOLE_IPV4}/file.bin"
    if culprit == "proxy":
        environment["http_proxy"] = f"http://user:SECRET@{BLACK_HOLE_IPV4}:3128"
        url = "http://origin.example/file.bin"
    with namespace({"origin.example": "127.0.0.1"}) as network:
        result = network.run_script(FETCH, url, cache, env=environment).check()
    error, seconds = result.stdout.splitlines()
    assert error.startswith("FetchTimeoutError") and "no connection" in error and "within the deadline" in error
    assert ("to the proxy" in error) == (culprit == "proxy")
    assert "SECRET" not in result.stdout + result.stderr
    assert 0.6 <= float(seconds) < 25  # two attempts; the default is 15 s for one
