"""Origins that serve one kept-alive connection at a time, and let all others wait."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

import rankload
from harness.fetch_calls import whole_log
from rankload._fetch.transfer import stream_limits
from rankload._urls import Url

_CONTENT = bytes(range(256)) * 4096
_CHUNK_BYTES = 64 << 10


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: _OneConnectionServer = self.server  # type: ignore[assignment]
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(match[1]), min(int(match[2]) + 1, len(_CONTENT))) if match else (0, len(_CONTENT))
        server.clients.append((self.path, self.client_address[1]))
        self.send_response(206 if match else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(end - begin))
        if match:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(_CONTENT)}")
        self.end_headers()
        for at in range(begin, end, 16 << 10):
            self.wfile.write(_CONTENT[at : min(at + (16 << 10), end)])
            time.sleep(0.04)  # so slow that more streams are tried, and wait for longer than a stall may last

    def log_message(self, format: str, *args: object) -> None:
        pass


class _OneConnectionServer(http.server.HTTPServer):
    """Attributes: clients, the path and the client's port of each request that was answered."""

    request_queue_size = 32

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.clients: list[tuple[str, int]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """The client has gone."""


@pytest.fixture
def server() -> Iterator[_OneConnectionServer]:
    with _OneConnectionServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        with contextlib.suppress(OSError):
            server.shutdown()


@pytest.mark.fault(76)
def test_one_connection_at_a_time(server, cache, monkeypatch, caplog):
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(_CHUNK_BYTES))
    monkeypatch.setenv("RANKLOAD_STALL_SECONDS", "1")
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.01")
    url = f"http://127.0.0.1:{server.server_port}"
    with whole_log(caplog):
        assert rankload.dist_fetch(f"{url}/a.bin", cache).read_bytes() == _CONTENT
        assert stream_limits.limit_for(Url.parse(url).server, 8) == 1
        failures = caplog.text.count("retrying")
        assert rankload.dist_fetch(f"{url}/b.bin", cache).read_bytes() == _CONTENT
    assert failures <= 1 and caplog.text.count("retrying") == failures
    assert len({port for path, port in server.clients if path == "/b.bin"}) == 1  # remembered


def test_further_connections_are_swallowed(cache, monkeypatch):
    """As by a firewall. The file has come in full over the first one, whatever becomes of the attempts."""
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(_CHUNK_BYTES))
    monkeypatch.setenv("RANKLOAD_CONNECT_SECONDS", "60")

    def serve() -> None:
        client, _ = listening.accept()
        for filling in waiting:  # from now on the queue is full
            filling.setblocking(False)
            filling.connect_ex(listening.getsockname())
        with client:
            client.recv(65536)
            client.sendall(f'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: {len(_CONTENT)}\r\n\r\n'.encode())
            for at in range(0, len(_CONTENT), 16 << 10):
                client.sendall(_CONTENT[at : at + (16 << 10)])
                time.sleep(0.02)

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = [stack.enter_context(socket.socket()) for _ in range(4)]
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.bin"
        began_at = time.monotonic()
        assert rankload.dist_fetch(url, cache, timeout=5, progress=False).read_bytes() == _CONTENT
        assert time.monotonic() - began_at < 30
        thread.join(10)
