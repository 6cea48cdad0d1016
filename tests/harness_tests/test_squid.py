"""squid forwards, asks for passwords, logs, and leaves nothing behind."""

import os
import socket
import urllib.request
from pathlib import Path

import pytest

from harness.certificates import Authority
from harness.nginx import nginx
from harness.scripts import run_program, run_script
from harness.squid import squid
from harness.waiting import wait_until

CONTENT = bytes(range(256)) * 1000


def test_it_forwards_and_logs(origin):
    url = origin.add("a model.pth", CONTENT)
    with squid() as proxy:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy.url}))
        assert opener.open(url, timeout=20).read() == CONTENT
        [access] = proxy.wait_for_accesses(1)
        assert (access.method, access.url, access.status, access.user) == ("GET", url, 200, "")
        assert access.bytes > len(CONTENT)
    assert "via" in origin.requests("a model.pth")[0].headers
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", proxy.port)) != 0


def test_it_caches_nothing(origin):
    url = origin.add("x", CONTENT, headers={"Cache-Control": "public, max-age=3600"})
    with squid() as proxy:
        for _ in range(2):
            run_program(["curl", "-sfo", os.devnull, url], env=proxy.environment).check()
    assert origin.request_count("x") == 2


def test_a_password(origin):
    url = origin.add("x", CONTENT)
    with squid("user", "a secret") as proxy:
        assert "curl: (22)" in run_program(["curl", "-sSfx", f"http://127.0.0.1:{proxy.port}", url]).stderr
        wrong = ["curl", "-sSfx", f"http://127.0.0.1:{proxy.port}", "--proxy-user", "user:a secret ", url]
        assert "error: 407" in run_program(wrong).stderr
        assert origin.request_count() == 0
        run_program(["curl", "-sfo", os.devnull, url], env=proxy.environment).check()
        accesses = proxy.wait_for_accesses(3)
        assert [(access.status, access.user) for access in accesses][::2] == [(407, ""), (200, "user")]
    assert origin.request_count() == 1


CLIENT = """
import sys, requests, urllib.request
print(len(urllib.request.urlopen(sys.argv[1]).read()))
print(len(requests.get(sys.argv[1]).content))
"""


def test_tls_goes_through_a_tunnel(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    authority = Authority(tmp_path)
    with nginx(tmp_path, tls=authority.certificate("127.0.0.1")) as server, squid("user", "secret") as proxy:
        result = run_script(CLIENT, server.url("x"), env={**authority.environment, **proxy.environment}).check()
        accesses = proxy.wait_for_accesses(2)
    assert result.stdout.split() == [str(len(CONTENT))] * 2
    assert {(access.method, access.url, access.status) for access in accesses} == {
        ("CONNECT", f"127.0.0.1:{server.port}", 200)
    }


def test_it_leaves_no_process_and_no_file(origin):
    with squid("user", "secret") as proxy:
        processes = proxy.processes
        assert len(processes) == 2
        assert not list(Path("/dev/shm").glob("*squid*")) + list(Path("/dev/shm").glob(f"*{proxy.port}*"))
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), 10, f"{processes} are gone")


def test_a_wrong_configuration_says_so(monkeypatch):
    monkeypatch.setattr("harness.squid._CONFIGURATION", "nonsense {{ {port} {scratch} {access}")
    with pytest.raises(AssertionError, match="nonsense"), squid():
        pass
