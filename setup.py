"""Fill in what depends on where the repository is published; all else is in pyproject.toml.

RANKLOAD_REPOSITORY_URL is the address of the repository's front page. With it, the package's metadata has project URLs
and README's relative links become absolute. Without it, as in a checkout, there are none of either.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

_ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(_ROOT / "docs" / "hooks"))

from repository_links import absolute_links  # noqa: E402 - the path comes first

_URL = os.environ.get("RANKLOAD_REPOSITORY_URL", "").rstrip("/")

setup(
    long_description=absolute_links((_ROOT / "README.md").read_text(encoding="utf-8"), _URL),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": _URL,
        "Documentation": f"{_URL}/tree/main/docs",
        "Changelog": f"{_URL}/blob/main/CHANGELOG.md",
        "Security": f"{_URL}/blob/main/SECURITY.md",
        "Issues": f"{_URL}/issues",
    }
    if _URL
    else {},
)
