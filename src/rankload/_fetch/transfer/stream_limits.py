"""Remember how many streams each server serves at a time, for the life of the process.

Some servers serve only a few connections, and let all others wait.
"""

from __future__ import annotations

from rankload._urls import Server

_limits: dict[Server, int] = {}


def limit_for(server: Server | None, limit: int) -> int:
    """Return the largest number of streams for a server, given the caller's limit."""
    return limit if server is None else min(limit, _limits.get(server, limit))


def lower_limit(server: Server | None, streams: int) -> None:
    """Record that a server left a further stream waiting while it served ``streams`` others."""
    if server is not None:
        _limits[server] = max(1, min(streams, _limits.get(server, streams)))
