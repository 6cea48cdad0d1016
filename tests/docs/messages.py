"""The texts of rankload's messages, as its sources have them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docs.example_world import ROOT

#: What stands in a message for a value that differs each time.
GAP = "…"

#: Texts of the system, and of torch, that are part of messages.
_OTHERS = ("No such file or directory", "No space left on device", "size mismatch for ")


@cache
def texts() -> str:
    """All literal texts of the package, with GAP for each value; one a line."""
    found = [*_OTHERS]
    for path in sorted((ROOT / "src").rglob("*.py")):
        found += _literals(path)
    return "\n".join(found)


def is_of_rankload(message: str) -> bool:
    """Whether the sources have all literal parts of a message as the documentation quotes it."""
    parts = [part.strip() for part in message.split(GAP)]
    return any(part for part in parts) and all(part in texts() for part in parts)


def _literals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
