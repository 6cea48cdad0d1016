"""``rankload inspect``: tables, JSON, differences, and what a remote checkpoint costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from harness import checkpoints
from harness.scripts import run_script
from rankload._cli import app

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    state_dict = {
        "encoder.0.weight": torch.zeros(10, 20),
        "encoder.0.bias": torch.zeros(10, dtype=torch.bfloat16),
        "head.weight": torch.zeros(3, 10),
    }
    save_file(state_dict, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def inspect(*words: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, words)])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_table(model: Path) -> None:
    lines = inspect(model).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["name", "dtype", "shape", "size"],
        ["encoder.0.weight", "float32", "[10,", "20]", "800", "B"],
        ["head.weight", "float32", "[3,", "10]", "120", "B"],
        ["encoder.0.bias", "bfloat16", "[10]", "20", "B"],
    ]  # in the order of the file
    assert "float32   2        920 B" in lines and "encoder  2        820 B" in lines
    assert lines[-1] == "3 tensors, 940 B"


def test_json(model: Path) -> None:
    found = json.loads(inspect(model, "--json", "--depth", "2"))
    assert found["size_bytes"] == 940
    assert found["tensors"][2] == {
        "name": "encoder.0.bias",
        "dtype": "bfloat16",
        "shape": [10],
        "size_bytes": 20,
        "file": "model.safetensors",
        "offset": model.stat().st_size - 20,
        "storage": "encoder.0.bias",
    }
    assert found["sums"]["prefix"] == {
        "encoder.0": {"tensors": 2, "size_bytes": 820},
        "head.weight": {"tensors": 1, "size_bytes": 120},
    }


def test_differences(model: Path, tmp_path: Path) -> None:
    other = {"encoder.0.weight": torch.zeros(10, 20), "encoder.0.bias": torch.zeros(10), "new": torch.zeros(1)}
    torch.save(other, tmp_path / "other.pth")
    found = json.loads(inspect(model, "--diff", tmp_path / "other.pth", "--json", exit_code=1))
    assert found == [
        {"name": "head.weight", "first": "float32 [3, 10]", "second": None},
        {"name": "encoder.0.bias", "first": "bfloat16 [10]", "second": "float32 [10]"},
        {"name": "new", "first": None, "second": "float32 [1]"},
    ]
    assert inspect(model, "--diff", model) == "name  first  second\n"


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    torch.save({"evil\x1b[2J": torch.zeros(1)}, tmp_path / "model.pth")
    assert "\x1b" not in inspect(tmp_path / "model.pth")


def test_remote_checkpoint_costs_less_than_a_megabyte(origin, tmp_path: Path) -> None:
    path = checkpoints.write_big(tmp_path, 64 * MIB).path
    found = json.loads(inspect(origin.add(path.name, path), "--json"))
    assert found["size_bytes"] >= 60 * MIB
    assert origin.bytes_sent() < MIB


def test_error_in_one_line(tmp_path: Path) -> None:
    result = run_script(
        "import sys; sys.argv = ['rankload', 'inspect', sys.argv[1]]; from rankload._cli import main; main()",
        tmp_path / "none.pth",
    )
    assert result.exitcode == 1 and result.stdout == ""
    assert result.stderr.startswith("rankload: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", ["inspect --help", "prefetch --help", "--help", "--version", "hash {file}"])
def test_no_torch_where_none_is_needed(tmp_path: Path, words: str) -> None:
    (tmp_path / "file").write_bytes(b"content")
    code = (
        "import sys\n"
        f"sys.argv = ['rankload', *{words.format(file=tmp_path / 'file').split()!r}]\n"
        "from rankload._cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules and 'requests' not in sys.modules\n"
    )
    assert run_script(code).exitcode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="paths")
def test_listing_a_local_checkpoint_needs_no_torch(model: Path) -> None:
    code = (
        f"import sys; sys.argv = ['rankload', 'inspect', {str(model)!r}]; from rankload._cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    assert run_script(code).exitcode == 0
