"""A few runs of every soak, so that none of them rots; many are for ``python -m soak.NAME``."""

from __future__ import annotations

import pytest

from soak import chaos, faults, kill_leader, kill_node, many_jobs, parsers, random_faults, runs


@pytest.mark.parametrize(
    ("soak", "count"),
    [(chaos, 6), (kill_leader, 2), (kill_node, 1), (random_faults, 5), (many_jobs, 1), (parsers, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_slice(soak, count, capsys):
    assert runs.main(soak.__name__, soak.run, ["--runs", str(count), "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("seed ") == count + 1 and f"{count} runs from seed 1" in out


def test_violation_is_told_and_its_files_are_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(source, directory):
        (directory / "evidence").touch()
        assert source.random() > 2, "wrong bytes"

    assert runs.main("violated", run, ["--runs", "2", "--seed", "7"]) == 1
    captured = capsys.readouterr()
    assert "violated: 2 runs from seed 7" in captured.out and "2 VIOLATION" in captured.out
    assert "wrong bytes" in captured.err and len(list(tmp_path.glob("soak-7-*/evidence"))) == 1


def test_fault_suite_slice(tmp_path, capsys):
    passing = tmp_path / "test_passing.py"
    passing.write_text(
        "import pytest\n\n@pytest.mark.fault(1)\ndef test_it():\n    pass\n\ndef test_other():\n    assert 0\n"
    )
    options = ["-o", "addopts=", "-c", "pyproject.toml", "--rootdir", "."]
    assert faults.main(["--times", "1", *options, str(passing)]) == 0
    assert capsys.readouterr().out.count("1 passed, 1 deselected") == 1
    failing = tmp_path / "test_failing.py"
    failing.write_text("import pytest\n\n@pytest.mark.fault(1)\ndef test_it():\n    assert 0\n")
    assert faults.main(["--times", "1", *options, str(failing)]) == 1
    assert "failed in 1 of 1" in capsys.readouterr().out
