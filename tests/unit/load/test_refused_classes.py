"""weights_only: all classes that a file needs are named at once, with what allows them."""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rankload

NAMES = ["argparse.Namespace", "collections.deque", "pathlib.PurePosixPath"]


def content() -> Any:
    return {
        "weight": torch.ones(2),
        "args": argparse.Namespace(lr=1),
        "path": pathlib.PurePosixPath("a"),
        "last": collections.deque([1]),
    }


def as_path(path: Path) -> Any:
    return str(path)


def as_open_file(path: Path) -> Any:
    return io.BytesIO(path.read_bytes())


@pytest.mark.parametrize("given", [as_path, as_open_file])
def test_all_are_listed(tmp_path: Path, given: Any) -> None:
    torch.save(content(), tmp_path / "file.pth")
    with pytest.raises(rankload.errors.UnsafePickleError, match=re.escape(f"add_safe_globals([{', '.join(NAMES)}])")):
        rankload.load(given(tmp_path / "file.pth"))
    with pytest.raises(rankload.errors.UnsafePickleError, match=re.escape(f"add_safe_globals([{', '.join(NAMES)}])")):
        rankload.dist_load_state_dict_from_url(str(tmp_path / "file.pth"))


def test_the_advice_helps(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "file.pth")
    refused = pytest.raises(rankload.errors.UnsafePickleError, match=r"add_safe_globals\(\[pathlib.PurePosixPath\]\)")
    with torch.serialization.safe_globals([argparse.Namespace, collections.deque]), refused:
        rankload.load(tmp_path / "file.pth")


def test_legacy_files_name_the_first(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(rankload.errors.UnsafePickleError, match=r"add_safe_globals\(\[argparse.Namespace\]\)"):
        rankload.load(tmp_path / "file.pth")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    classes = [type(f"Kind{number:02}", (), {"__module__": __name__}) for number in range(30)]
    globals().update({kind.__name__: kind for kind in classes})
    torch.save({"weight": torch.ones(1), "rest": [kind() for kind in classes]}, tmp_path / "file.pth")
    with pytest.raises(rankload.errors.UnsafePickleError, match="Kind19, and 10 more") as caught:
        rankload.load(tmp_path / "file.pth")
    assert "Kind20" not in str(caught.value)
