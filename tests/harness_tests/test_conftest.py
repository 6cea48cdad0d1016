"""What tests/conftest.py does to tests, seen by running pytest on small ones."""

import sys
from pathlib import Path

import pytest
import torch

from harness.scripts import run_program

TESTS_DIR = Path(__file__).parent.parent


def run_pytest(tmp_path, code, *words, **env):
    (tmp_path / "test_it.py").write_text("import os, pytest\n" + code)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS_DIR}\nmarkers = gpu\n")
    result = run_program(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rs", *words, tmp_path],
        env={"PYTHONPATH": str(TESTS_DIR), "CI": None, **env},
        working_dir=tmp_path,
    )
    return result.exitcode, result.stdout


def test_nothing_of_the_caller_reaches_a_test(tmp_path):
    launchers = ["RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"]
    others = ["HTTPS_PROXY", "http_proxy", "RANKLOAD_OFFLINE", "TORCH_HOME", "HF_TOKEN", "AWS_PROFILE"]
    code = """
def test_it(tmp_path_factory):
    assert "stray" not in os.environ.values(), os.environ
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        assert os.environ[name].startswith(str(tmp_path_factory.getbasetemp())), name
"""
    exitcode, output = run_pytest(tmp_path, code, **dict.fromkeys(launchers + others, "stray"))
    assert exitcode == 0, output


def test_each_test_has_a_home_of_its_own(tmp_path):
    code = """
@pytest.mark.parametrize("number", [1, 2])
def test_it(number):
    with open(os.path.expanduser("~/file"), "x"):
        pass
"""
    exitcode, output = run_pytest(tmp_path, code)
    assert exitcode == 0, output


def test_a_process_left_behind_fails_its_test_and_dies(tmp_path):
    code = """
import pathlib
from harness.scripts import start_program

def test_it():
    program = start_program(["sleep", "1000"])
    pathlib.Path(__file__).with_name("pid").write_text(str(program.pid))
"""
    exitcode, output = run_pytest(tmp_path, code)
    assert exitcode == 1
    assert "still running after the test" in output
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_process_of_a_wider_fixture_stays(tmp_path):
    code = """
from harness.scripts import start_program

@pytest.fixture(scope="module")
def sleeper():
    with start_program(["sleep", "1000"]) as program:
        yield program

@pytest.mark.parametrize("number", [1, 2])
def test_it(sleeper, number):
    assert sleeper.is_alive
"""
    exitcode, output = run_pytest(tmp_path, code)
    assert exitcode == 0, output


SKIPS = {
    "a call": "def test_it():\n    pytest.skip('for the reason X')\n",
    "a mark": "@pytest.mark.skip(reason='for the reason X')\ndef test_it(): pass\n",
    "a condition": "@pytest.mark.skipif(True, reason='for the reason X')\ndef test_it(): pass\n",
    "a fixture": "@pytest.fixture\ndef it():\n    pytest.skip('for the reason X')\ndef test_it(it): pass\n",
    "a module": "pytest.skip('for the reason X', allow_module_level=True)\n",
}


@pytest.mark.parametrize("skip", SKIPS)
def test_a_skip_is_a_failure_on_ci_only(tmp_path, skip):
    exitcode, output = run_pytest(tmp_path, SKIPS[skip])
    assert exitcode in (0, 5), output  # 5: nothing was left to run
    assert "1 skipped" in output
    exitcode, output = run_pytest(tmp_path, SKIPS[skip], CI="true")
    assert exitcode in (1, 2), output
    assert "skipped on CI" in output
    assert "for the reason X" in output


def test_an_expected_failure_is_no_skip(tmp_path):
    code = "@pytest.mark.xfail(reason='known')\ndef test_it():\n    assert False\n"
    exitcode, output = run_pytest(tmp_path, code, CI="true")
    assert exitcode == 0, output


def test_a_gpu_test_may_skip_on_ci_only_without_an_accelerator(tmp_path):
    code = "@pytest.mark.gpu\ndef test_it():\n    pytest.skip('no accelerator')\n"
    exitcode, output = run_pytest(tmp_path, code, CI="true")
    assert exitcode == int(torch.accelerator.is_available()), output
