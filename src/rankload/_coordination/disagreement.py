"""Describe how the arguments of two ranks differ, and what to call instead. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankload._urls import scheme_of

#: Arguments derived from the URL: they are compared, but not shown.
_OF_THE_URL = ("origin", "query")


def describe_disagreement(first: Mapping[str, Any], first_rank: int, mine: Mapping[str, Any], own_rank: int) -> str:
    """Return e.g. ``url: rank 0 has [...], rank 1 has [...]``; empty if the arguments are equal.

    Args:
        first, mine: arguments of two ranks, by name. A URL's query is given by parameter names and digests, without
            values.
        first_rank, own_rank: the two ranks.
    """
    differing = [name for name in sorted(first.keys() | mine.keys()) if first.get(name) != mine.get(name)]
    comparable = [name for name in differing if name not in _OF_THE_URL]
    details = [
        f"{name}: rank {first_rank} has {first.get(name)!r}, rank {own_rank} has {mine.get(name)!r}"
        for name in comparable
    ]
    if len(comparable) < len(differing) and "url" not in comparable:
        details.append(
            f"url: rank {first_rank} has {first.get('url')!r}, rank {own_rank} has another one, which differs in "
            f"{_differing_parameters(first.get('query', []), mine.get('query', []))}"
        )
    return "; ".join(details)


def advice_on(first: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Return advice to append to a message if the ranks want different files; else an empty string."""
    if all(first.get(name) == mine.get(name) for name in ("url", *_OF_THE_URL)):
        return ""
    is_local = any(scheme_of(url) in (None, "file") for url in mine.get("url", []))
    call = "rankload.load(path)" if is_local else "rankload.hub.load_state_dict_from_url(url)"
    return f". If each rank is to load a file of its own, call {call}, which is not collective"


def _differing_parameters(first: Sequence[Any], mine: Sequence[Any]) -> str:
    odd = {name for name, _ in _parameters(first) ^ _parameters(mine)}
    if not odd:
        return "its query, user or fragment"
    named = [repr(name) for name in sorted(odd) if name]
    if "" in odd:
        named.append("a part without a name")
    return f"its query: {', '.join(named)}"


def _parameters(queries: Sequence[Sequence[Sequence[str]]]) -> set[tuple[str, str]]:
    return {(name, digest) for query in queries for name, digest in query}
