"""What the ranks of a soak do. In a module of its own: a program's main module cannot be imported by its ranks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from harness.fetch_calls import fetch


def fetch_digest(rank: int, url: str, cache: str, **arguments: Any) -> str:
    """The digest of what dist_fetch found; rankload's whole log goes to stderr."""
    return hashlib.sha256(Path(fetch(rank, url, cache, progress=False, **arguments)).read_bytes()).hexdigest()


def fetch_on_node(rank: int, url: str, root: str, ranks_per_node: int) -> str:
    """The same, where each node has a cache directory of its own."""
    return fetch_digest(rank, url, f"{root}/node{rank // ranks_per_node}")
