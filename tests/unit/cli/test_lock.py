"""``rankload lock``: digests and sizes of a table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from harness.origin import Origin
from rankload._cli import app
from rankload._fetch.checkpoint_table import read_table


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKLOAD_MODEL_DIR", str(tmp_path / "cache"))
    return tmp_path


def lock(*words: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["lock", *words])
    assert result.exit_code == exit_code, result.output
    return result.stdout if exit_code == 0 or "--check" in words else result.stderr


def content(value: float) -> bytes:
    return save({"weight": torch.full((4,), value)})


def test_lock_fills_in_and_keeps_the_rest(origin: Origin, directory: Path) -> None:
    parts = {f"model-0000{n}-of-00002.safetensors": content(n) for n in (1, 2)}
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    urls = {name: origin.add(name, part) for name, part in parts.items()}
    urls["index"] = origin.add("model.safetensors.index.json", index.encode())
    urls["one"] = origin.add("one.safetensors", content(3))
    (directory / "local.safetensors").write_bytes(content(4))
    table = directory / "rankload.toml"
    table.write_text(
        f'# weights\n[one]\nlicence = "MIT" # free\nurl = "{urls["one"]}"\n\n[several]\nurl = "{urls["index"]}"\n'
        '\n[local]\nurl = "local.safetensors"\n'
    )
    table.chmod(0o640)
    assert lock("one") == "one: new sha256, size\n"
    assert read_table(table)["several"].sha256 is None
    assert lock() == "one: unchanged\nseveral: new sha256, size, parts\nlocal: new sha256, size\n"
    rows = read_table(table)
    assert rows["one"].sha256 == hashlib.sha256(content(3)).hexdigest() and rows["one"].size_bytes == len(content(3))
    assert dict(rows["several"].part_digests) == {
        name: hashlib.sha256(part).hexdigest() for name, part in parts.items()
    }
    assert rows["several"].size_bytes == len(index) + sum(map(len, parts.values()))
    assert rows["local"].sha256 == hashlib.sha256(content(4)).hexdigest()
    text = table.read_text()
    assert text.startswith('# weights\n[one]\nlicence = "MIT" # free\n') and table.stat().st_mode & 0o777 == 0o640
    before = len(origin.requests())
    assert lock("--check") == "one: unchanged\nseveral: unchanged\nlocal: unchanged\n"
    assert table.read_text() == text and len(origin.requests()) == before
    assert sorted(path.name for path in directory.iterdir()) == ["cache", "local.safetensors", "rankload.toml"]


def test_changed_origin_is_an_error_until_update(origin: Origin, directory: Path) -> None:
    table = directory / "rankload.toml"
    table.write_text(f'[one]\nurl = "{origin.add("one.safetensors", content(1))}"\n')
    lock()
    text = table.read_text()
    origin.add("one.safetensors", content(2))
    assert lock() == "one: unchanged\n"  # the cached file is still the one of the table
    output = lock("--model-dir", str(directory / "other"), exit_code=1)
    assert "rankload: one: invalid hash value" in output and table.read_text() == text
    assert lock("--update") == "one: changed sha256\n"
    assert read_table(table)["one"].sha256 == hashlib.sha256(content(2)).hexdigest()


def test_part_that_changes_is_an_error(origin: Origin, directory: Path) -> None:
    index = json.dumps({"weight_map": {"a": "part-1.safetensors"}}).encode()
    url = origin.add("model.safetensors.index.json", index)
    origin.add("part-1.safetensors", content(1))
    (directory / "rankload.toml").write_text(f'[several]\nurl = "{url}"\n')
    lock()
    origin.add("part-1.safetensors", content(2))
    assert "invalid hash value" in lock("--model-dir", str(directory / "other"), exit_code=1)


def test_check_fails_without_a_digest(origin: Origin, directory: Path) -> None:
    table = directory / "rankload.toml"
    table.write_text(f'[one]\nurl = "{origin.add("one.safetensors", content(1))}"\n')
    text = table.read_text()
    assert lock("--check", exit_code=1) == "one: new sha256, size\n" and table.read_text() == text


def test_one_that_fails_does_not_stop_the_others(origin: Origin, directory: Path) -> None:
    table = directory / "rankload.toml"
    table.write_text(
        f'[gone]\nurl = "{origin.url("gone.pth")}"\n[one]\nurl = "{origin.add("one.safetensors", content(1))}"\n'
    )
    output = lock(exit_code=1)
    assert "rankload: gone: HTTP Error 404" in output and read_table(table)["one"].sha256


def test_name_that_the_table_lacks(directory: Path) -> None:
    (directory / "rankload.toml").write_text('[one]\nurl = "https://host/a.pth"\n')
    result = CliRunner().invoke(app, ["lock", "two"])
    assert result.exit_code == 1 and "'two' is not in rankload.toml; it has one" in str(result.exception)
