"""The table of fault cases at the end of a test run, seen by running pytest on small tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from harness.scripts import run_program

TESTS_DIR = Path(__file__).parent.parent

CODE = """
import os, pytest, time

@pytest.mark.fault(1)
def test_passes():
    pass

@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.parametrize("number", [1, 2])
def test_fails_once(number):
    assert number == 1

@pytest.mark.fault(3)
@pytest.mark.skip(reason="for the reason X")
def test_skipped():
    pass

@pytest.fixture
def broken():
    yield
    raise RuntimeError

@pytest.mark.fault(4)
def test_torn_down_badly(broken):
    pass

@pytest.mark.parametrize("value", [1, pytest.param(2, marks=pytest.mark.fault(5))])
def test_one_parameter(value):
    if value == 1:
        pytest.skip("not of any case")

@pytest.mark.fault(6)
@pytest.mark.parametrize("is_here", [True, False])
def test_skipped_in_part(is_here):
    if not is_here:
        pytest.skip("for the reason Y")

@pytest.mark.fault(7)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_takes_long(number):
    time.sleep(0.2)
"""


def run_pytest(tmp_path: Path, code: str, *words: str) -> tuple[int, str]:
    (tmp_path / "test_it.py").write_text(code)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS_DIR}\nmarkers = fault\n")
    result = run_program(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *words, tmp_path],
        env={"PYTHONPATH": str(TESTS_DIR), "CI": None},
        working_dir=tmp_path,
    )
    return result.exitcode, result.stdout


_ROW = re.compile(r"^ +(\d+)  (\S+) +(\d+) +(\d+\.\d)  (.+)$", re.MULTILINE)


def rows(output: str) -> dict[int, tuple[str, int, str]]:
    """Slug, number of tests and outcome, of each case in the table."""
    return {int(number): (slug, int(tests), outcome) for number, slug, tests, _, outcome in _ROW.findall(output)}


def seconds_of(case: int, output: str) -> float:
    [seconds] = [float(seconds) for number, _, _, seconds, _ in _ROW.findall(output) if int(number) == case]
    return seconds


@pytest.mark.parametrize("words", [[], ["-n", "2", "--dist", "loadgroup"]], ids=["alone", "xdist"])
def test_every_case_that_ran_has_a_row(tmp_path: Path, words: list[str]) -> None:
    _, output = run_pytest(tmp_path, CODE, *words)
    assert output.count("fault cases") == 1
    assert rows(output) == {
        1: ("cut-with-length", 3, "FAILED (1 of 3)"),
        2: ("cut-without-length", 2, "FAILED (1 of 2)"),
        3: ("cut-chunked", 1, "skipped: for the reason X"),
        4: ("range-ignored", 1, "FAILED"),
        5: ("wrong-range", 1, "passed"),
        6: ("file-changed-at-origin", 2, "passed (1 of 2 skipped: for the reason Y)"),
        7: ("nothing-left-to-send", 3, "passed"),
    }, output
    assert 0.6 <= seconds_of(7, output) < 3  # of all its tests


def test_a_test_that_takes_its_worker_along_has_failed(tmp_path: Path) -> None:
    code = "import os, pytest\n@pytest.mark.fault(7)\ndef test_it(): os._exit(1)\n"
    _, output = run_pytest(tmp_path, code, "-n", "1")
    assert rows(output) == {7: ("nothing-left-to-send", 1, "FAILED")}, output


def test_no_table_without_a_case(tmp_path: Path) -> None:
    _, output = run_pytest(tmp_path, "def test_it(): pass\n")
    assert "fault cases" not in output


@pytest.mark.parametrize("words", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_tests_of_chosen_cases_run_and_no_others(tmp_path: Path, words: list[str]) -> None:
    exitcode, output = run_pytest(tmp_path, CODE, "--fault", "3", "--fault", "5", *words)
    assert exitcode == 0, output
    assert "1 passed, 1 skipped" in output
    assert rows(output).keys() == {3, 5}


def test_choosing_a_case_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    exitcode, _ = run_pytest(tmp_path, CODE, "--fault", "1000")
    assert exitcode == pytest.ExitCode.USAGE_ERROR
