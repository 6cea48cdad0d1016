"""How many streams each server has served at a time, remembered for the life of the process.

Some serve few connections, and let the others wait.
"""

from __future__ import annotations

from rankload._urls import Server

_limits: dict[Server, int] = {}


def limit_for(server: Server | None, limit: int) -> int:
    """Return how many streams to use at the most, given the caller's limit."""
    return limit if server is None else min(limit, _limits.get(server, limit))


def lower_limit(server: Server | None, streams: int) -> None:
    """Note that a server did not begin to serve one stream more than these until that was given up."""
    if server is not None:
        _limits[server] = max(1, min(streams, _limits.get(server, streams)))
