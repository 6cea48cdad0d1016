"""What tests/conftest.py does to tests, seen by running pytest on small ones."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.scripts import run_program

pytestmark = pytest.mark.xdist_group("conftest")  # in one worker: all tests look at the same two runs

TESTS_DIR = Path(__file__).parent.parent

#: What a caller may have set.
STRAY = [
    *("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    *("HTTPS_PROXY", "http_proxy", "RANKLOAD_OFFLINE", "TORCH_HOME", "HF_TOKEN", "AWS_PROFILE"),
]

SKIPS = {
    "call": "def test_it():\n    pytest.skip('for the reason X')\n",
    "mark": "@pytest.mark.skip(reason='for the reason X')\ndef test_it(): pass\n",
    "condition": "@pytest.mark.skipif(True, reason='for the reason X')\ndef test_it(): pass\n",
    "fixture": "@pytest.fixture\ndef it():\n    pytest.skip('for the reason X')\ndef test_it(it): pass\n",
    "module": "pytest.skip('for the reason X', allow_module_level=True)\n",
}

FILES = {
    **SKIPS,
    "stray": """
def test_it(tmp_path_factory):
    assert "stray" not in os.environ.values(), os.environ
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        assert os.environ[name].startswith(str(tmp_path_factory.getbasetemp())), name
""",
    "home": """
@pytest.mark.parametrize("number", [1, 2])
def test_it(number):
    with open(os.path.expanduser("~/file"), "x"):
        pass
""",
    "left_behind": """
import pathlib
from harness.scripts import start_program

def test_it():
    program = start_program(["sleep", "1000"])
    pathlib.Path(__file__).with_name("pid").write_text(str(program.pid))
""",
    "wider_fixture": """
from harness.scripts import start_program

@pytest.fixture(scope="module")
def sleeper():
    with start_program(["sleep", "1000"]) as program:
        yield program

@pytest.mark.parametrize("number", [1, 2])
def test_it(sleeper, number):
    assert sleeper.is_alive
""",
    "expected_failure": "@pytest.mark.xfail(reason='known')\ndef test_it():\n    assert False\n",
    "gpu": "@pytest.mark.gpu\ndef test_it():\n    pytest.skip('no accelerator')\n",
}


@dataclass
class Run:
    """How pytest ended on all files.

    Attributes:
        folder: Where the files are.
        output: What it printed, with a line for each test's outcome.
    """

    folder: Path
    output: str

    def outcomes(self, name: str) -> list[str]:
        """How the tests of a file ended, and all that is said of them."""
        return re.findall(rf"^([A-Z]+ .*test_{name}\.py.*)", self.output, re.MULTILINE)


def run_pytest(folder: Path, **env: str | None) -> Run:
    for name, code in FILES.items():
        (folder / f"test_{name}.py").write_text("import os, pytest\n" + code)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS_DIR}\nmarkers = gpu\n")
    words = ["-p", "conftest", "-p", "no:cacheprovider", "-rA", "--continue-on-collection-errors"]
    result = run_program(
        [sys.executable, "-m", "pytest", *words, folder],
        env={"PYTHONPATH": str(TESTS_DIR), "COLUMNS": "300", "CI": None, **dict.fromkeys(STRAY, "stray"), **env},
        working_dir=folder,
    )
    assert result.exitcode == 1, result.stdout  # some tests fail in either run
    return Run(folder, result.stdout)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pytest(tmp_path_factory.mktemp("usual"))


@pytest.fixture(scope="module")
def on_ci(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pytest(tmp_path_factory.mktemp("ci"), CI="true")


def only(outcomes: list[str]) -> str:
    [outcome] = outcomes
    return outcome


def test_nothing_of_the_caller_reaches_a_test(usual: Run) -> None:
    assert only(usual.outcomes("stray")).startswith("PASSED"), usual.output


def test_each_test_has_a_home_of_its_own(usual: Run) -> None:
    assert [outcome.split()[0] for outcome in usual.outcomes("home")] == ["PASSED"] * 2, usual.output


def test_a_process_left_behind_fails_its_test_and_dies(usual: Run) -> None:
    passed, failed = usual.outcomes("left_behind")  # the test itself, and what comes after it
    assert passed.startswith("PASSED") and failed.startswith("ERROR"), usual.output
    assert "still running after the test" in failed
    assert not Path("/proc", (usual.folder / "pid").read_text()).exists()


def test_a_process_of_a_wider_fixture_stays(usual: Run) -> None:
    assert [outcome.split()[0] for outcome in usual.outcomes("wider_fixture")] == ["PASSED"] * 2, usual.output


@pytest.mark.parametrize("skip", SKIPS)
def test_a_skip_is_a_failure_on_ci_only(usual: Run, on_ci: Run, skip: str) -> None:
    outcome = only(usual.outcomes(skip))
    assert outcome.startswith("SKIPPED") and "for the reason X" in outcome, usual.output
    outcome = only(on_ci.outcomes(skip))
    assert outcome.startswith(("FAILED", "ERROR")), on_ci.output
    assert "skipped on CI" in outcome and "for the reason X" in outcome, on_ci.output


def test_an_expected_failure_is_no_skip(on_ci: Run) -> None:
    assert only(on_ci.outcomes("expected_failure")).startswith("XFAIL"), on_ci.output


def test_a_gpu_test_may_skip_on_ci_only_without_an_accelerator(on_ci: Run) -> None:
    expected = "FAILED" if torch.accelerator.is_available() else "SKIPPED"
    assert only(on_ci.outcomes("gpu")).startswith(expected), on_ci.output
