"""nginx serves, logs, and is gone afterwards."""

import socket
import urllib.request

import pytest

from harness.nginx import nginx
from harness.scripts import run_program


def test_it_serves_a_folder_and_logs_what_it_sent(tmp_path):
    content = bytes(range(256)) * 1000
    (tmp_path / "a model.pth").write_bytes(content)
    with nginx(tmp_path) as server:
        with urllib.request.urlopen(server.url("a model.pth"), timeout=20) as response:
            assert response.read() == content
        request = urllib.request.Request(server.url("a model.pth"), headers={"Range": "bytes=10-19"})
        with urllib.request.urlopen(request, timeout=20) as response:
            assert response.read() == content[10:20]
        missing = run_program(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", server.url("missing")])
        assert missing.stdout == "404"
        accesses = server.wait_for_accesses(3)
    assert [(access.path, access.status) for access in accesses] == [
        ("/a model.pth", 200),
        ("/a model.pth", 206),
        ("/missing", 404),
    ]
    assert [access.bytes for access in accesses[:2]] == [len(content), 10]
    assert [access.range for access in accesses] == ["", "bytes=10-19", ""]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


def test_it_is_gone_after_an_error_in_the_test(tmp_path):
    with pytest.raises(ZeroDivisionError), nginx(tmp_path) as server:
        _ = 1 / 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
