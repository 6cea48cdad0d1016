"""Every Python and shell block of README and docs runs, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.blocks import Block, blocks_of
from docs.example_world import ROOT, make_world
from docs.run_blocks import check_syntax, run_page
from harness.origin import Origin

PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

#: Languages of blocks that are no code to run.
_SHOWN_ONLY = {"text", "mermaid", "json", "toml"}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _has_code(page: Path) -> bool:
    return any(block.language in ("python", "sh") and not block.not_run for block in blocks_of(page))


@pytest.mark.parametrize("page", [page for page in PAGES if _has_code(page)], ids=_name)
def test_blocks_run(page: Path, origin: Origin, tmp_path: Path) -> None:
    run_page(page, blocks_of(page), make_world(origin, tmp_path))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A block without a language would be run by nothing, and a reason of one word is none."""
    for block in blocks_of(page):
        assert block.language in {"python", "sh", *_SHOWN_ONLY}, f"{block.where}: language {block.language!r}"
        assert not block.not_run or len(block.not_run.split()) > 3, block.where
        check_syntax(block)


def test_comments_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n<!-- given: model -->\n<!-- raises: LoadError -->\n```python\nx = 1\n```\n\n"
        "<!-- not run: it needs a cluster here -->\n\n```sh\nsrun x\n```\n\n```text\nout\n```\n"
    )
    assert blocks_of(page) == [
        Block(page, "python", "x = 1\n", 6, given="model", raises="LoadError"),
        Block(page, "sh", "srun x\n", 12, not_run="it needs a cluster here"),
        Block(page, "text", "out\n", 16),
    ]


@pytest.mark.parametrize(("language", "text"), [("python", "def f(:\n"), ("sh", "if true\n")])
def test_broken_syntax_is_found(language: str, text: str) -> None:
    with pytest.raises((SyntaxError, AssertionError)):
        check_syntax(Block(Path("page.md"), language, text, 1))
