"""How many streams each server has served at a time, remembered for the life of the process.

Some serve few connections, and let the others wait.
"""

from __future__ import annotations

from rankload._urls import Server, server_of

_limits: dict[Server, int] = {}


def limit_for(url: str, limit: int) -> int:
    """Return how many streams to use at the most, given the caller's limit."""
    server = server_of(url)
    return limit if server is None else min(limit, _limits.get(server, limit))


def lower_limit(url: str, streams: int) -> None:
    """Note that a server did not begin to serve one stream more than these until that was given up."""
    server = server_of(url)
    if server is not None:
        _limits[server] = max(1, min(streams, _limits.get(server, streams)))
