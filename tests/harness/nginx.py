"""A real nginx on a free loopback port: for speed, and as the second opinion on our own origin."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from harness.ports import reserved_port
from harness.scripts import Program, start_program
from harness.spawner import spawner
from harness.waiting import wait_until

_CONFIGURATION = """
daemon off;
master_process off;
error_log stderr notice;
pid {scratch}/pid;
events {{ worker_connections 512; }}
http {{
    log_format accesses escape=json '{{"method":"$request_method","path":"$uri","status":$status,'
                                    '"bytes":$body_bytes_sent,"range":"$http_range"}}';
    access_log {scratch}/accesses accesses;
    client_body_temp_path {scratch};
    proxy_temp_path {scratch};
    fastcgi_temp_path {scratch};
    uwsgi_temp_path {scratch};
    scgi_temp_path {scratch};
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    server {{
        listen 127.0.0.1:{port};
        root {root};
    }}
}}
"""


@dataclass(frozen=True)
class Access:
    """One line of the access log.

    Attributes:
        bytes: Of the body, as sent.
        range: The Range header of the request; empty without one.
    """

    method: str
    path: str
    status: int
    bytes: int
    range: str


@dataclass(frozen=True)
class Nginx:
    """A running server."""

    root: Path
    port: int
    _log: Path = field(repr=False)
    _program: Program = field(repr=False)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{quote(name)}"

    def accesses(self) -> list[Access]:
        """Requests whose replies have ended, in the order of their ends."""
        complete, _, _ = self._log.read_text().rpartition("\n")
        return [Access(**json.loads(line)) for line in complete.splitlines()]

    def wait_for_accesses(self, count: int, timeout_seconds: float = 10) -> list[Access]:
        """The first ``count`` or more. nginx writes a line just after the last byte, so tests wait here."""
        wait_until(lambda: len(self.accesses()) >= count, timeout_seconds, f"{count} lines in nginx's access log")
        return self.accesses()


@contextlib.contextmanager
def nginx(root: Path) -> Iterator[Nginx]:
    """Serves the files under ``root`` until the block ends.

    As one process, which is enough for one disk and two cores and leaves no worker behind.
    """
    binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert binary is not None, "nginx is not installed: apt-get install nginx-light"
    scratch = spawner().new_directory()
    try:
        with reserved_port() as port:
            (scratch / "nginx.conf").write_text(_CONFIGURATION.format(scratch=scratch, port=port, root=root))
            (scratch / "accesses").touch()
            with start_program([binary, "-p", scratch, "-c", scratch / "nginx.conf"]) as program:
                wait_until(lambda: _answers(port, program), 20, "nginx listens")
                yield Nginx(root, port, scratch / "accesses", program)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _answers(port: int, program: Program) -> bool:
    assert program.is_alive, f"nginx ended at once:\n{program.stderr}"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
