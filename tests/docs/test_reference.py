"""The reference pages say what the code says: errors, settings, options."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main

import rankload.errors
from docs.example_world import ROOT
from docs.messages import is_of_rankload
from rankload._cli import app
from rankload._settings import MODEL_DIR_VARIABLE, Settings, variable
from rankload.errors import RankloadError

DOCS = ROOT / "docs"
_CODE = re.compile(r"`([^`]+)`")
_ROW = re.compile(r"^\| (`[^|]*) \| ([^|]*) \| ", re.MULTILINE)


def _read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def _error_classes() -> list[str]:
    own = vars(rankload.errors).items()
    return [
        name for name, value in own if name[0] != "_" and isinstance(value, type) and issubclass(value, RankloadError)
    ]


def _sections(page: str) -> dict[str, str]:
    titles_and_texts = re.split(r"^## (.+)$", _read(page), flags=re.MULTILINE)[1:]
    return dict(zip(titles_and_texts[::2], titles_and_texts[1::2], strict=True))


def test_every_error_has_an_anchor() -> None:
    assert sorted(_sections("reference/errors.md")) == sorted(_error_classes())


@pytest.mark.parametrize("name", _error_classes())
def test_an_error_is_explained(name: str) -> None:
    section = _sections("reference/errors.md")[name]
    assert "\n- Attributes: " in section and "\n- What to do: " in section
    [typical] = re.findall(r"^- Typical message: (.+)$", section, re.MULTILINE)
    for message in _CODE.findall(typical):
        assert is_of_rankload(message), f"no message of rankload's: {message}"
    declared = vars(getattr(rankload.errors, name)).get("__annotations__", {})
    public = [attribute for attribute in declared if attribute not in ("hdrs", "fp")]
    named = set(_CODE.findall(section))
    assert not [attribute for attribute in public if attribute != "url" and attribute not in named]


def test_the_drawn_tree_is_that_of_the_module() -> None:
    assert rankload.errors.__doc__ is not None
    tree = [line.strip().replace("``", "`") for line in rankload.errors.__doc__.splitlines() if "──" in line]
    page = [line.strip() for line in _read("reference/errors.md").splitlines() if "──" in line]
    assert page == tree


@pytest.mark.parametrize("row", _ROW.findall(_read("troubleshooting.md")))
def test_a_message_in_troubleshooting_is_one_of_rankloads(row: tuple[str, str]) -> None:
    for message in _CODE.findall(row[0]):
        assert is_of_rankload(message), message


def test_every_setting_is_listed_with_its_default() -> None:
    defaults = dict(re.findall(r"^\| `(RANKLOAD_\w+)` \| ([^|]*) \| ", _read("reference/settings.md"), re.MULTILINE))
    assert defaults.pop(MODEL_DIR_VARIABLE) == "torch.hub's"
    assert defaults == {
        variable(field.name): f"{float(field.default):g}" if field.name != "chunk_bytes" else str(field.default)
        for field in fields(Settings)
    }


def test_every_option_is_listed() -> None:
    command = typer.main.get_command(app).commands["prefetch"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    listed = set(re.findall(r"^\| `(--[\w-]+)", _sections("reference/cli.md")["rankload prefetch"], re.MULTILINE))
    assert listed == options - {"--help"}


def test_every_command_has_a_section_with_its_options() -> None:
    sections = _sections("reference/cli.md")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        section = sections[f"rankload {name}"]
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert not [option for option in options - {"--help"} if option not in section], name


def test_pages_name_pages_that_are_there() -> None:
    """Relative links of README and docs lead to files of the repository, with the anchors that they name."""
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "tests" / "README.md"]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            found = (page.parent / path) if path else page
            if not found.exists() or (anchor and anchor not in _anchors(found)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as repository browsers and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
