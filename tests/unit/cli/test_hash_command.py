"""``rankload hash``: digests, and names that carry them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import rankload
from rankload._cli import app

DIGEST = hashlib.sha256(b"content").hexdigest()


def hash_files(*words: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["hash", *map(str, words)])
    assert result.exit_code == exit_code, result.output
    return result.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model.pth").write_bytes(b"content")
    return tmp_path / "model.pth"


def test_as_sha256sum_prints_it(file: Path) -> None:
    assert hash_files(file) == f"{DIGEST}  {file}\n"
    assert json.loads(hash_files(file, "--json")) == [{"path": str(file), "sha256": DIGEST}]


@pytest.mark.parametrize("name", ["model.pth", "model-0123abcd.pth", f"model-{DIGEST[:8]}.pth"])
def test_rename(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    renamed = tmp_path / f"model-{DIGEST[:8]}.pth"
    assert hash_files(tmp_path / name, "--rename") == f"{DIGEST}  {renamed}\n"
    assert [path.name for path in tmp_path.iterdir()] == [renamed.name] and renamed.read_bytes() == b"content"


def test_another_file_with_the_name_stays(file: Path) -> None:
    taken = file.with_name(f"model-{DIGEST[:8]}.pth")
    taken.write_bytes(b"other")
    hash_files(file, "--rename", exit_code=1)
    assert taken.read_bytes() == b"other" and file.read_bytes() == b"content"


def test_one_missing_file_does_not_keep_the_others(file: Path, tmp_path: Path) -> None:
    assert hash_files(tmp_path / "none", file, exit_code=1) == f"{DIGEST}  {file}\n"


def test_users_can_check_what_a_publisher_renamed(origin, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pth")
    hash_files(tmp_path / "model.pth", "--rename")
    [path] = tmp_path.glob("model-*.pth")
    url = origin.add(path.name, path)
    assert rankload.dist_load_state_dict_from_url(url, tmp_path / "cache", check_hash=True)["weight"].tolist() == [1, 1]
