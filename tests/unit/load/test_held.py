"""Files that are replaced or rewritten between the look at them and the end of the load."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from rankload._load.node.held import hold
from rankload._types import FileIdentity
from rankload.errors import LoadError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    path.write_bytes(b"first!")
    return path


def _replace(path: Path, content: bytes) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(content)
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    other.replace(path)


def test_file_that_is_loaded_by_its_name_may_go_but_not_change(path: Path) -> None:
    with ExitStack() as closing:
        assert hold(path, None, closing).loaded_by_name(closing) == path
    with ExitStack() as closing:
        hold(path, None, closing).loaded_by_name(closing)
        path.unlink()


def test_replacement_of_the_same_size_and_time_is_found(path: Path) -> None:
    with pytest.raises(LoadError, match="was replaced or rewritten while it was loaded"), ExitStack() as closing:
        hold(path, None, closing).loaded_by_name(closing)
        _replace(path, b"other!")


def test_rewriting_in_place_is_found(path: Path) -> None:
    with pytest.raises(LoadError, match="was replaced or rewritten while it was loaded"), ExitStack() as closing:
        hold(path, None, closing).loaded_by_name(closing)
        path.write_bytes(b"longer than before")


def test_an_error_of_the_load_itself_comes_first(path: Path) -> None:
    with pytest.raises(ValueError, match="no such layer"), ExitStack() as closing:
        hold(path, None, closing).loaded_by_name(closing)
        _replace(path, b"other!")
        raise ValueError("no such layer")


def test_file_that_was_replaced_since_it_was_verified_is_not_opened(path: Path) -> None:
    verified = FileIdentity.of(path.stat())
    _replace(path, b"other!")
    with pytest.raises(LoadError, match="was replaced"), ExitStack() as closing:
        hold(path, None, closing, verified)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [({}, True), ({"inode": 2}, True), ({"mtime_ns": 9}, True), ({"size_bytes": 2}, False)],
    ids=str,
)
def test_nodes_may_see_other_inodes_and_slightly_other_times(change: dict[str, int], is_same: bool) -> None:
    seen = FileIdentity(**{"inode": 1, "size_bytes": 1, "mtime_ns": 1, **change})
    assert FileIdentity(1, 1, 1).is_same(seen, is_exact=False) is is_same
    assert FileIdentity(1, 1, 1).is_same(seen, is_exact=True) is not bool(change)
    later = FileIdentity(2, 1, 10_000_000_000)
    assert not FileIdentity(1, 1, 1).is_same(later, is_exact=False)
