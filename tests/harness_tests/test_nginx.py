"""nginx serves, logs, misbehaves as told, and is gone afterwards."""

import base64
import gzip
import http.client
import socket
import ssl
import time
import urllib.request
from contextlib import closing

import pytest

from harness import nginx_behaviours as behaviours
from harness.certificates import Authority
from harness.client import get
from harness.nginx import nginx
from harness.scripts import run_program, run_script

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "a model.pth").write_bytes(CONTENT)
    return folder


def test_it_serves_a_folder_and_logs_what_it_sent(root):
    with nginx(root) as server:
        with urllib.request.urlopen(server.url("a model.pth"), timeout=20) as response:
            assert response.read() == CONTENT
        assert get(server.url("a model.pth"), Range="bytes=10-19", Authorization="Bearer x")[2] == CONTENT[10:20]
        missing = run_program(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", server.url("missing")])
        assert missing.stdout == "404"
        accesses = server.wait_for_accesses(3)
    assert [(access.path, access.status) for access in accesses] == [
        ("/a model.pth", 200),
        ("/a model.pth", 206),
        ("/missing", 404),
    ]
    assert [access.bytes for access in accesses[:2]] == [len(CONTENT), 10]
    assert [access.range for access in accesses] == ["", "bytes=10-19", ""]
    assert [access.authorization for access in accesses] == ["", "Bearer x", ""]
    assert accesses[0].host == f"127.0.0.1:{server.port}"
    assert is_free(server.port)


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_it_is_gone_after_an_error_in_the_test(root):
    with pytest.raises(ZeroDivisionError), nginx(root) as server:
        _ = 1 / 0
    assert is_free(server.port)


def test_a_wrong_configuration_says_so(root):
    with (
        pytest.raises(AssertionError, match='unknown directive "nonsense"'),
        nginx(root, behaviours.Behaviour("nonsense;")),
    ):
        pass


def test_a_rate(root):
    with nginx(root, behaviours.rate(len(CONTENT))) as server:
        started = time.perf_counter()
        assert get(server.url("a model.pth"))[2] == CONTENT
        assert 0.8 < time.perf_counter() - started < 10


def test_no_ranges(root):
    with nginx(root, behaviours.no_ranges()) as server:
        status, headers, body = get(server.url("a model.pth"), Range="bytes=10-19")
    assert (status, body) == (200, CONTENT)
    assert "Accept-Ranges" not in headers


def test_a_password(root):
    with nginx(root, behaviours.password("user", "secret")) as server:
        url = server.url("a model.pth")
        assert get(url)[0] == 401
        assert get(url, Authorization=basic("user:wrong"))[0] == 401
        assert get(url, Authorization=basic("user:secret"))[2] == CONTENT


def basic(credentials):
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


def test_busy_at_first(root):
    with nginx(root, behaviours.busy_at_first(2, retry_after=7)) as server:
        replies = [get(server.url("a model.pth")) for _ in range(4)]
    assert [status for status, _, _ in replies] == [503, 503, 200, 200]
    assert [headers["Retry-After"] for _, headers, _ in replies] == ["7", "7", None, None]
    assert replies[0][1]["Connection"] == "close"


def test_busy_for_a_share_of_the_requests(root):
    with nginx(root, behaviours.busy_share(50, status=429)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        statuses = set()
        with closing(connection):
            for _ in range(100):  # the odds that all are alike are 1 to 2**99
                connection.request("HEAD", "/a%20model.pth")
                with connection.getresponse() as response:
                    statuses.add((response.status, response.headers["Retry-After"]))
    assert statuses == {(200, None), (429, "0")}


def test_at_most_so_many_at_a_time(root):
    with nginx(root, behaviours.at_most(2), behaviours.rate(1000)) as server:
        (root / "other").write_bytes(b"x")
        with (
            urllib.request.urlopen(server.url("a model.pth"), timeout=20),
            urllib.request.urlopen(server.url("a model.pth"), timeout=20),
        ):
            status, headers, _ = get(server.url("a model.pth"))
            assert (status, headers["Retry-After"]) == (429, "0")
            assert get(server.url("other"))[0] == 200


def test_redirects_to_another_server(root):
    with nginx(root) as target, nginx(root, behaviours.redirect_to(target.base_url, status=307)) as server:
        status, headers, _ = get(server.url("a model.pth") + "?key=a%2Fb")
        assert (status, headers["Location"]) == (307, target.url("a model.pth") + "?key=a%2Fb")
        with urllib.request.urlopen(server.url("a model.pth"), timeout=20) as response:
            assert response.read() == CONTENT


def test_gzip_for_clients_that_accept_it(root):
    with nginx(root, behaviours.gzip_if_accepted()) as server:
        status, headers, body = get(server.url("a model.pth"), Accept_Encoding="gzip", Range="bytes=0-9")
        plain = get(server.url("a model.pth"), Accept_Encoding="identity")
    assert (status, headers["Content-Encoding"], headers["Content-Length"]) == (200, "gzip", None)
    assert headers["ETag"].startswith('W/"')
    assert gzip.decompress(body) == CONTENT
    assert (plain[1]["Content-Encoding"], plain[2]) == (None, CONTENT)


def test_gzip_for_clients_that_do_not_accept_it(root):
    (root / "a model.pth.gz").write_bytes(gzip.compress(CONTENT))
    with nginx(root, behaviours.gzip_always()) as server:
        _, headers, body = get(server.url("a model.pth"), Accept_Encoding="identity")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == CONTENT


def test_tls_with_an_authority_of_its_own(root, tmp_path):
    authority = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=str(authority.path))
    with nginx(root, tls=authority.certificate("127.0.0.1", "localhost")) as server:
        assert server.url("x").startswith("https://127.0.0.1:")
        assert get(server.url("a model.pth"), trust=trust)[2] == CONTENT
        with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|self-signed"):
            get(server.url("a model.pth"))


@pytest.mark.parametrize(
    ("names", "is_expired", "complaint"),
    [(("example.org",), False, "IP address mismatch"), (("127.0.0.1",), True, "certificate has expired")],
)
def test_tls_with_a_wrong_certificate(root, tmp_path, names, is_expired, complaint):
    authority = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=str(authority.path))
    with (
        nginx(root, tls=authority.certificate(*names, is_expired=is_expired)) as server,
        pytest.raises(ssl.SSLCertVerificationError, match=complaint),
    ):
        get(server.url("a model.pth"), trust=trust)


CLIENTS = """
import subprocess, sys, urllib.request, requests
url = sys.argv[1]
print(len(urllib.request.urlopen(url).read()))
print(len(requests.get(url).content))
print(len(subprocess.run(["curl", "-sf", url], stdout=subprocess.PIPE, check=True).stdout))
"""


def test_its_environment_makes_clients_trust_the_authority(root, tmp_path):
    authority = Authority(tmp_path)
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server:
        result = run_script(CLIENTS, server.url("a model.pth"), env=authority.environment).check()
    assert result.stdout.split() == [str(len(CONTENT))] * 3
