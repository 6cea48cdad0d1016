"""A real squid as a forward proxy on a free loopback port: plain requests, and CONNECT for https.

    with squid(user="user", password="secret") as proxy:
        run_script(client, url, env=proxy.environment)
        assert [access.method for access in proxy.accesses()] == ["CONNECT"]

It caches nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from harness.listening import wait_until_listening
from harness.ports import reserved_port
from harness.scripts import Program, ProgramStarter, start_program
from harness.spawner import spawner
from harness.waiting import wait_until

# Started as root, squid becomes this user, and refuses to stay root. Debian's packages make it.
_USER = "proxy"

_CONFIGURATION = """
http_port 127.0.0.1:{port}
visible_hostname localhost
pid_filename none
coredump_dir none
logformat accesses {{"method":"%rm","url":"%ru","status":%>Hs,"bytes":%<st,"user":"%un"}}
access_log stdio:{scratch}/accesses logformat=accesses
cache_log {scratch}/log
cache deny all

shutdown_lifetime 0 seconds
pinger_enable off
netdb_filename none
dns_nameservers 127.0.0.1  # names come from /etc/hosts; a question to a real server could hang
{access}
http_access deny all
"""

_WITH_PASSWORD = """
auth_param basic program {scratch}/check
auth_param basic children 1 startup=1
auth_param basic credentialsttl 1 hour
acl known proxy_auth REQUIRED
http_access allow known
"""

# squid hands both over in percent encoding, on a line.
_CHECK = """#!/bin/sh
while read -r user password; do
  if [ "$user" = '{user}' ] && [ "$password" = '{password}' ]; then echo OK; else echo ERR; fi
done
"""


@dataclass(frozen=True)
class ProxyAccess:
    """One line of the access log.

    Attributes:
        url: Of CONNECT host:port.
        bytes: Sent to the client, headers included.
        user: Empty without one.
    """

    method: str
    url: str
    status: int
    bytes: int
    user: str


@dataclass(frozen=True)
class Squid:
    """A running proxy."""

    port: int
    user: str | None
    password: str
    _log: Path = field(repr=False)
    _program: Program = field(repr=False)

    @property
    def processes(self) -> list[int]:
        """Process ids: squid's own, and that of its helper which checks passwords."""
        return [self._program.pid, *self._program.children]

    @property
    def url(self) -> str:
        """With user and password, if it wants them."""
        credentials = f"{quote(self.user)}:{quote(self.password)}@" if self.user is not None else ""
        return f"http://{credentials}127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str | None]:
        """Variables that lead a process's requests through it."""
        # Lower case: curl ignores HTTP_PROXY.
        return {"http_proxy": self.url, "https_proxy": self.url, "no_proxy": None, "NO_PROXY": None}

    def accesses(self) -> list[ProxyAccess]:
        """Requests that have ended, in the order of their ends."""
        complete, _, _ = self._log.read_text().rpartition("\n")
        lines = [json.loads(line) for line in complete.splitlines()]
        return [ProxyAccess(**{**line, "user": line["user"].strip("-")}) for line in lines]

    def wait_for_accesses(self, count: int, timeout_seconds: float = 10) -> list[ProxyAccess]:
        """The first ``count`` or more. A line is written after the client has all, a tunnel's when it is closed."""
        wait_until(lambda: len(self.accesses()) >= count, timeout_seconds, f"{count} lines in squid's access log")
        return self.accesses()


@contextlib.contextmanager
def squid(user: str | None = None, password: str = "", *, start: ProgramStarter = start_program) -> Iterator[Squid]:
    """Forwards requests until the block ends; with a user, only with that user's name and password.

    Args:
        start: Starts it elsewhere: ``Namespace.start_program``.
    """
    binary = shutil.which("squid", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert binary is not None, "squid is not installed: apt-get install squid"
    scratch = spawner().new_directory()
    try:
        access = "http_access allow all"
        if user is not None:
            access = _WITH_PASSWORD.format(scratch=scratch)
            (scratch / "check").write_text(_CHECK.format(user=quote(user), password=quote(password)))
            (scratch / "check").chmod(0o755)
        with reserved_port() as port:
            configuration = _CONFIGURATION.format(scratch=scratch, port=port, access=access)
            (scratch / "squid.conf").write_text(configuration)
            for name in ("accesses", "log"):
                (scratch / name).touch()
            _give_to_squid(scratch)
            # Its shared memory bears this name, and two squids must not share it.
            service = f"rankload{port}"
            with start([binary, "-N", "-n", service, "-f", scratch / "squid.conf"]) as program:
                _wait_until_ready(program, port, scratch / "log")
                for path in Path("/dev/shm").glob(f"{service}-*"):
                    path.unlink()  # it has them open, and a SIGKILL would leave them behind
                yield Squid(port, user, password, scratch / "accesses", program)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _give_to_squid(scratch: Path) -> None:
    if os.geteuid() != 0:
        return
    scratch.parent.chmod(0o711)  # the spawner's own, closed to others
    for path in (scratch, *scratch.iterdir()):
        shutil.chown(path, _USER)


def _wait_until_ready(program: Program, port: int, log: Path) -> None:
    try:
        wait_until_listening(program, port)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from None
