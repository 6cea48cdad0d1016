"""What ``rankload rm`` and ``rankload prune`` remove where others can write, too."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import rankload
from rankload._cli import app, cache_commands


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's, far from the cache."""
    path = tmp_path / "documents" / "thesis.tex"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    return path


def prune(cache: Path, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["prune", "--keep-latest", "0", "--yes", "--model-dir", str(cache)])
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.mark.fault(60)
@pytest.mark.parametrize("place", [".rankload/quarantine", "sub/.rankload/quarantine", "sub/.rankload", ".rankload"])
def test_links_to_a_folder_are_not_followed(cache, mine, place):
    """Whoever may write to the cache could else name a folder of the user's to be emptied."""
    link = cache / place
    link.parent.mkdir(parents=True)
    if not place.endswith("quarantine"):
        (mine.parent / "quarantine").mkdir()
        mine = mine.rename(mine.parent / "quarantine" / mine.name)
    link.symlink_to(mine.parents[0] if place.endswith("quarantine") else mine.parents[1])
    assert "0 items" in prune(cache)
    assert mine.read_bytes() == b"mine"


@pytest.mark.fault(60)
@pytest.mark.parametrize("place", ["sub", ".rankload/0123456789abcdef", "x.safetensors-0123456789abcdef"])
def test_links_to_another_cache_are_not_followed(origin, cache, tmp_path, place):
    """It is not the one to be pruned."""
    other = rankload.dist_fetch(origin.add("x.index.json", b"{}"), tmp_path / "other", file_name="x.index.json").parent
    partial = other / "never_there.bin.c9be96d8-0-0-0badc0de.partial"
    partial.write_bytes(b"half")
    (cache / place).parent.mkdir(parents=True)
    (cache / place).symlink_to(other)
    assert "0 items" in prune(cache)
    assert (other / "x.index.json").exists() and partial.exists()


@pytest.mark.fault(60)
def test_link_that_comes_after_the_look_is_not_followed_either(cache, mine, monkeypatch):
    """Much may happen until all that is listed is removed."""
    quarantine = cache / "sub" / ".rankload" / "quarantine"
    quarantine.mkdir(parents=True)
    (quarantine / mine.name).write_bytes(b"bad")
    size_of = cache_commands._size_of

    def look_then_swap(paths):
        quarantine.rename(quarantine.parent / "before")
        quarantine.symlink_to(mine.parent)
        return size_of(paths)

    monkeypatch.setattr(cache_commands, "_size_of", look_then_swap)
    prune(cache, exit_code=1)
    assert os.listdir(mine.parent) == [mine.name]


@pytest.mark.fault(60)
def test_users_file_that_was_adopted_is_not_removed(origin, tmp_path):
    """``model_dir`` may be anybody's project, and the origin's file another one: only a piece of it was compared."""
    content = io.BytesIO()
    torch.save({"w": torch.zeros(100_000)}, content)
    url = origin.add("weights.pth", content.getvalue())
    mine = bytearray(content.getvalue())
    at = mine.index(bytes(4000))
    mine[at + 400 : at + 404] = torch.ones(1).numpy().tobytes()
    path = tmp_path / "weights.pth"
    path.write_bytes(mine)
    assert rankload.dist_load_state_dict_from_url(url, tmp_path)["w"].sum() == 1
    assert "0 items" in prune(tmp_path)
    assert path.read_bytes() == mine
    assert rankload.dist_load_state_dict_from_url(url, tmp_path)["w"].sum() == 1


@pytest.mark.fault(60)
def test_copy_of_a_partial_file_is_the_users(cache):
    cache.mkdir()
    partial = cache / "never_there.bin.c9be96d8-0-0-0badc0de.partial"
    for ending in ("", ".journal", ".journal.new", ".bak", ".journal.bak"):
        partial.with_name(partial.name + ending).write_bytes(b"half")
    prune(cache)
    assert sorted(os.listdir(cache)) == [f"{partial.name}.bak", f"{partial.name}.journal.bak"]
