"""The site builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from docs.example_world import ROOT
from harness.scripts import run_program

pytest.importorskip("mkdocs")

pytestmark = pytest.mark.xdist_group("site")  # one build, whatever the number of workers

_HOME = "http://site/"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    run_program(  # not --quiet: what is not shown does not count as a warning
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        env={"NO_MKDOCS_2_WARNING": "1"},
        working_dir=ROOT,
    ).check()
    return directory


class _Page(HTMLParser):
    """Collects links and anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.anchors.update(filter(None, (named.get("id"), named.get("name") if tag == "a" else None)))
        self.links += filter(None, (named.get("href"), named.get("src")))


def _pages(site: Path) -> Iterator[tuple[str, _Page]]:
    for path in sorted(site.rglob("*.html")):
        if path.name != "404.html":  # its links begin at the root of a server
            yield path.relative_to(site).as_posix(), _Page(path)


def test_internal_links_resolve(site: Path) -> None:
    pages = dict(_pages(site))
    assert len(pages) > 30
    broken = []
    for name, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(_HOME + name, link))
            if target.netloc != "site" or target.scheme != "http":
                continue
            path = unquote(target.path).lstrip("/")
            file = f"{path}index.html" if path.endswith("/") or not path else path
            if not (site / file).is_file() or (
                target.fragment and file in pages and not _has(pages[file], target.fragment)
            ):
                broken.append(f"{name}: {link}")
    assert not broken


def _has(page: _Page, fragment: str) -> bool:
    return fragment.startswith("__") or unquote(fragment) in page.anchors


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    """Clusters without internet read documentation, too. Mermaid's diagrams are the one exception of the theme."""
    for name, page in _pages(site):
        html = (site / name).read_text(encoding="utf-8")
        assert "fonts.googleapis" not in html and 'src="http' not in html, name
        assert page.links


def test_every_public_call_is_in_the_search_index(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {document["location"] for document in index["docs"]}
    calls = ["dist_load_state_dict_from_url", "dist_load_into", "dist_fetch", "open_checkpoint", "load"]
    assert {f"reference/api/#rankload.{name}" for name in [*calls, "LoadReport", "Checkpoint"]} <= places
    assert any("lease" in document["title"].lower() for document in index["docs"])
