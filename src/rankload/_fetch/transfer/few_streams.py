"""Servers that serve few connections and let the rest wait, remembered for the life of the process."""

from __future__ import annotations

from rankload._urls import Server, server_of

_most: dict[Server | None, int] = {}


def most(url: str, limit: int) -> int:
    """Return how many streams to use at the most, given the caller's limit."""
    return min(limit, _most.get(server_of(url), limit))


def remember(url: str, streams: int) -> None:
    """Note that a server did not begin to serve one stream more than these until that was given up."""
    server = server_of(url)
    if server is not None:
        _most[server] = max(1, min(streams, _most.get(server, streams)))
