"""The code blocks of a Markdown page, and what the comments before them say.

A comment stands on a line of its own before a block, or anywhere for ``ranks``:

    <!-- ranks: 1 -->             this page's Python runs in one process (default: 2 ranks)
    <!-- given: model -->         names of docs/given.py that the block takes for granted
    <!-- file: train.py -->       the block is a file for the commands after it
    <!-- raises: FetchError -->   the block has to raise it, on every rank
    <!-- environment: NAME=x -->  variables for the block's processes
    <!-- not run: why -->         the block cannot run in a test; its syntax is checked
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_COMMENTS_BEFORE = re.compile(r"(?:<!-- [^\n]*? -->\n+)+\Z")
_COMMENT = re.compile(r"<!-- (?P<name>given|file|raises|environment|not run): (?P<value>.*?) -->")
_RANKS = re.compile(r"<!-- ranks: (\d) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of its first line of code, counted from 1.
        given, file, raises, environment, not_run: the comments before it; empty where there is none.
    """

    page: Path
    language: str
    text: str
    line: int
    given: str = ""
    file: str = ""
    raises: str = ""
    environment: str = ""
    not_run: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    markdown = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(markdown):
        before = _COMMENTS_BEFORE.search(markdown, 0, fence.start())
        comments = (
            {match["name"].replace(" ", "_"): match["value"] for match in _COMMENT.finditer(before[0])}
            if before
            else {}
        )
        line = markdown.count("\n", 0, fence.start("text")) + 1
        found.append(Block(page, fence["language"], fence["text"], line, **comments))
    return found


def ranks_of(page: Path) -> int:
    """How many ranks run the page's Python blocks."""
    match = _RANKS.search(page.read_text(encoding="utf-8"))
    return int(match[1]) if match else 2
