"""A real nginx on a free loopback port: for speed, and as the second opinion on our own origin.

    with nginx(root) as server: ...                                                # a plain file server
    with nginx(root, behaviours.rate(2_000_000), behaviours.no_ranges()) as server: ...
    with nginx(root, tls=authority.certificate("127.0.0.1")) as server: ...        # https

How it misbehaves stands in ``harness.nginx_behaviours``; a behaviour is that of the whole server.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from harness.certificates import Certificate
from harness.listening import wait_until_listening
from harness.nginx_behaviours import Behaviour
from harness.ports import reserved_port
from harness.scripts import Program, ProgramStarter, start_program
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
                                    '"bytes":$body_bytes_sent,"range":"$http_range","host":"$http_host",'
                                    '"authorization":"$http_authorization"}}';
    access_log {scratch}/accesses accesses;
    client_body_temp_path {scratch};
    proxy_temp_path {scratch};
    fastcgi_temp_path {scratch};
    uwsgi_temp_path {scratch};
    scgi_temp_path {scratch};
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    {http}
    server {{
        listen {address}:{port}{listen_options};
        root {root};
        {server}
    }}
}}
"""


@dataclass(frozen=True)
class Access:
    """One line of the access log.

    Attributes:
        bytes: Of the body, as sent.
        range: The Range header of the request; empty without one, as are the other two.
    """

    method: str
    path: str
    status: int
    bytes: int
    range: str
    host: str
    authorization: str


@dataclass(frozen=True)
class Nginx:
    """A running server."""

    root: Path
    port: int
    scheme: str
    address: str
    _log: Path = field(repr=False)
    _program: Program = field(repr=False)

    @property
    def base_url(self) -> str:
        return f"{self.scheme}://{self.address}:{self.port}"

    def url(self, name: str) -> str:
        return f"{self.base_url}/{quote(name)}"

    def accesses(self) -> list[Access]:
        """Requests whose replies have ended, in the order of their ends."""
        complete, _, _ = self._log.read_text().rpartition("\n")
        return [Access(**json.loads(line)) for line in complete.splitlines()]

    def wait_for_accesses(self, count: int, timeout_seconds: float = 10) -> list[Access]:
        """The first ``count`` or more. nginx writes a line just after the last byte, so tests wait here."""
        wait_until(lambda: len(self.accesses()) >= count, timeout_seconds, f"{count} lines in nginx's access log")
        return self.accesses()

    def wait_for_bytes(self, count: int, timeout_seconds: float = 10) -> list[Access]:
        """The accesses that sent ``count`` bytes of files or more; as above, for tests that cannot count requests."""
        wait_until(lambda: bytes_of_files(self.accesses()) >= count, timeout_seconds, f"{count} bytes in nginx's log")
        return self.accesses()


def bytes_of_files(accesses: Iterable[Access]) -> int:
    """Bytes of files that were sent: pages about errors do not count."""
    return sum(access.bytes for access in accesses if access.status in (200, 206))


@contextlib.contextmanager
def nginx(
    root: Path,
    *behaviours: Behaviour,
    tls: Certificate | None = None,
    address: str = "127.0.0.1",
    port: int | None = None,
    start: ProgramStarter = start_program,
) -> Iterator[Nginx]:
    """Serves the files under ``root`` until the block ends.

    As one process, which is enough for one disk and two cores and leaves no worker behind.

    Args:
        port: A fixed one, in a network namespace of its own; otherwise a free one.
        start: Starts it elsewhere: ``Namespace.start_program``.
    """
    binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert binary is not None, "nginx is not installed: apt-get install nginx-light"
    if tls is not None:
        behaviours = (*behaviours, Behaviour(f"ssl_certificate {tls.chain}; ssl_certificate_key {tls.key};"))
    scratch = spawner().new_directory()
    try:
        with contextlib.nullcontext(port) if port else reserved_port() as port:
            configuration = _CONFIGURATION.format(
                scratch=scratch,
                address=address,
                port=port,
                listen_options=" ssl" if tls else "",
                root=root,
                http="\n".join(behaviour.http for behaviour in behaviours),
                server="\n".join(behaviour.server for behaviour in behaviours),
            )
            (scratch / "nginx.conf").write_text(configuration)
            for behaviour in behaviours:
                for name, text in behaviour.files.items():
                    (scratch / name).write_text(text)
            (scratch / "accesses").touch()
            with start([binary, "-p", scratch, "-c", scratch / "nginx.conf"]) as program:
                wait_until_listening(program, port)
                yield Nginx(root, port, "https" if tls else "http", address, scratch / "accesses", program)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
