"""Rewrite relative links for places where the repository's files are not beside the page; include parts of README.

README and docs link to one another and to the sources by relative paths, which a repository browser follows. The site
holds docs alone, and a package index shows README alone. MkDocs calls the functions ``on_…`` of this module; setup.py
calls `absolute_links`. The repository's address is not in the repository: RANKLOAD_REPOSITORY_URL gives it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Files outside docs that are pages of the site: path in the repository → path in the site.
PAGES = {
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}

#: What these pages are called there; index.md is a page of its own.
_COPIED = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
#: Stands for a section of README, so that its text is in the repository once.
_SECTION_OF_README = re.compile(r"<!-- section of README: (?P<title>.+?) -->")

_FENCE = re.compile(r"^[ ]*```.*?^[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)


def absolute_links(markdown: str, repository_url: str) -> str:
    """Return README's text for a page that stands alone.

    Args:
        markdown: README.md.
        repository_url: of the repository's front page; empty: not known, then links become their texts.
    """

    def absolute(path: str, fragment: str, is_image: bool) -> str | None:
        return _address(path, fragment, repository_url, is_image=is_image)

    return _rewritten(markdown, "", absolute)


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's own pages to the site."""
    from mkdocs.structure.files import File

    for name in _COPIED:
        page = File.generated(config, PAGES[name], content=(ROOT / name).read_text(encoding="utf-8"))
        page.edit_uri = None
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point relative links to the site's pages, or to the repository where they lead out of the site."""
    in_site = page.file.src_uri
    in_repository = {PAGES[name]: name for name in _COPIED}.get(in_site, f"docs/{in_site}")

    def in_site_or_absolute(path: str, fragment: str, is_image: bool) -> str | None:
        target = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return _address(path, fragment, config.repo_url or "", is_image=is_image)
        if (ROOT / "docs" / target).is_dir():
            target = posixpath.join(target, "index.md")
        return posixpath.relpath(target, posixpath.dirname(in_site) or ".") + fragment

    def section(match: re.Match[str]) -> str:
        return _rewritten(_section_of_readme(match["title"]), "", in_site_or_absolute)

    page_itself = _rewritten(markdown, posixpath.dirname(in_repository), in_site_or_absolute)
    return _SECTION_OF_README.sub(section, page_itself)


def _section_of_readme(title: str) -> str:
    """Return a section with its heading."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin = readme.index(f"## {title}\n")
    return readme[begin : readme.index("\n## ", begin)]


def _rewritten(markdown: str, folder: str, new_target: Callable[[str, str, bool], str | None]) -> str:
    """Replace the relative links of a page outside its code blocks; None leaves the link's text alone."""

    def replaced(match: re.Match[str]) -> str:
        path, sign, fragment = match["target"].partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        is_image = bool(match["image"])
        target = new_target(posixpath.normpath(posixpath.join(folder, path)), sign + fragment, is_image)
        if target is None:
            return "" if is_image else match["text"]
        return f"{match['image']}[{match['text']}]({target})"

    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _LINK.sub(replaced, markdown[end:])])


def _address(path: str, fragment: str, repository_url: str, *, is_image: bool) -> str | None:
    if not repository_url:
        return None
    kind = "raw" if is_image else "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository_url.rstrip('/')}/{kind}/main/{path}{fragment}"
