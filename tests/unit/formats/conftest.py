"""Files of every format."""

from __future__ import annotations

from pathlib import Path

import formats
import pytest


@pytest.fixture(params=formats.WRITERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A file of each format, under a name that tells nothing, and the format's name."""
    file_format, write = formats.WRITERS[request.param]
    path = tmp_path / "file"
    write(path)
    return file_format, path
