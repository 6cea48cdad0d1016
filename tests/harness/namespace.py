"""A network of a test's own: real host names on real ports, which lead nowhere but to the test's servers.

    with (
        namespace({"github.com": "127.0.0.1", "slow.example": [BLACK_HOLE_IPV6, "127.0.0.1"]}) as network,
        nginx(root, tls=authority.certificate("github.com"), port=443, start=network.start_program),
    ):
        network.run_script(client, "https://github.com/model.pth", env=authority.environment).check()

There is a loopback interface and no other, so nothing can leave, and a name that is not in ``hosts`` has no address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.scripts import PathLike, Program, ProgramResult, start_program
from harness.spawner import spawner
from harness.waiting import wait_until

# Packets for these disappear without a word, as behind a broken tunnel or a firewall that drops: connecting
# takes as long as the client lets it. From the ranges for documentation (RFC 3849, RFC 5737).
BLACK_HOLE_IPV6 = "2001:db8::dead"
BLACK_HOLE_IPV4 = "192.0.2.66"

# Global addresses on the loopback interface: a client that sorts addresses (RFC 6724) tries the IPv6 one first.
_SET_UP = """
PATH="$PATH:/usr/sbin:/sbin"
ip link set lo up
ip address add $HOLE_6/128 dev lo nodad
ip address add $HOLE_4/32 dev lo
nft -f - <<END
table inet holes {
  chain input {
    type filter hook input priority 0
    ip6 daddr $HOLE_6 drop
    ip daddr $HOLE_4 drop
  }
}
END
mount --bind "$HOSTS" /etc/hosts
echo up
exec sleep infinity
"""


class Namespace:
    """A network namespace, and a mount namespace for its /etc/hosts, which a process keeps alive."""

    def __init__(self, keeper: Program) -> None:
        self._keeper = keeper

    def start_program(
        self,
        argv: Sequence[PathLike],
        *,
        env: Mapping[str, str | None] | None = None,
        working_dir: PathLike | None = None,
    ) -> Program:
        """Starts a command inside, as ``scripts.start_program`` does outside."""
        directory = os.fspath(working_dir or Path.cwd())
        enter = ["nsenter", f"--target={self._keeper.pid}", "--net", "--mount", f"--wdns={directory}", "--"]
        return start_program([*enter, *argv], env=env, working_dir=working_dir)

    def run_program(
        self, argv: Sequence[PathLike], timeout_seconds: float = 60, *, env: Mapping[str, str | None] | None = None
    ) -> ProgramResult:
        """Runs a command inside to its end."""
        with self.start_program(argv, env=env) as program:
            return program.wait(timeout_seconds)

    def run_script(
        self,
        code_or_path: str | Path,
        *words: PathLike,
        env: Mapping[str, str | None] | None = None,
        timeout_seconds: float = 60,
    ) -> ProgramResult:
        """Runs Python code (a string) or a file of it (a Path) inside to its end."""
        script = [code_or_path] if isinstance(code_or_path, Path) else ["-c", code_or_path]
        return self.run_program([sys.executable, *script, *words], timeout_seconds, env=env)


@contextlib.contextmanager
def namespace(hosts: Mapping[str, str | Sequence[str]] | None = None) -> Iterator[Namespace]:
    """Makes the network; needs root. It lasts until the block ends and its last program has.

    Args:
        hosts: Name -> address or addresses, beside localhost; all of 127.0.0.0/8 can be listened on.
    """
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for name, addresses in (hosts or {}).items():
        lines += [f"{address} {name}" for address in ([addresses] if isinstance(addresses, str) else addresses)]
    scratch = spawner().new_directory()
    (scratch / "hosts").write_text("\n".join(lines) + "\n")
    variables = {"HOSTS": str(scratch / "hosts"), "HOLE_6": BLACK_HOLE_IPV6, "HOLE_4": BLACK_HOLE_IPV4}
    # Without a PID namespace: process ids mean the same inside and outside, so a program inside can be killed.
    keeping = ["unshare", "--net", "--mount", "sh", "-euc", _SET_UP]
    try:
        with start_program(keeping, env=variables) as keeper:
            wait_until(lambda: _is_up(keeper), 20, "the namespace is up")
            yield Namespace(keeper)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_up(keeper: Program) -> bool:
    assert keeper.is_alive, f"cannot make a network namespace: {keeper.stderr}"
    return keeper.stdout == "up\n"
