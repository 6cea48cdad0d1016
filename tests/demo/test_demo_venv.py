"""launch/venv.sh on a project of its own, whose build backend needs no network and can be held up."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

VENV_SH = Path(__file__).resolve().parents[2] / "launch" / "venv.sh"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tried"
version = "1"
dependencies = []
optional-dependencies = { one = [], two = [] }
"""

# Notes each installation, and waits in it as long as there is a file "hold".
BACKEND = """
import pathlib, time, zipfile

root = pathlib.Path(__file__).parent

def _metadata():
    return "Metadata-Version: 2.1\\nName: tried\\nVersion: 1\\nProvides-Extra: one\\nProvides-Extra: two\\n"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with (root / "installations").open("a") as log:
        log.write("installation\\n")
    while (root / "hold").exists():
        time.sleep(0.05)
    if (root / "broken").exists():
        raise RuntimeError("this build is broken")
    name = "tried-1-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("tried.py", "installed = True\\n")
        wheel.writestr("tried-1.dist-info/METADATA", _metadata())
        wheel.writestr("tried-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("tried-1.dist-info/RECORD", "")
    return name
"""


class Project:
    def __init__(self, root):
        self.root = root
        (root / "launch").mkdir()
        shutil.copy(VENV_SH, root / "launch" / "venv.sh")
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "constraints.txt").write_text("")
        (root / "backend.py").write_text(BACKEND)
        self.started = []

    def start(self, *extras, **environment):
        process = subprocess.Popen(
            [str(self.root / "launch" / "venv.sh"), *extras],
            env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *extras, **environment):
        process = self.start(*extras, **environment)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    @property
    def installations(self):
        log = self.root / "installations"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def works(self):
        python = self.root / ".venv" / "bin" / "python"
        return subprocess.run([python, "-c", "import tried; assert tried.installed"], check=False).returncode == 0

    def wait_for_installations(self, count):
        deadline = time.monotonic() + 60
        while self.installations < count:
            assert time.monotonic() < deadline, "no installation began"
            threading.Event().wait(0.05)


@pytest.fixture
def project(tmp_path):
    project = Project(tmp_path)
    yield project
    for process in project.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_sets_up_once_and_again_only_when_something_changed(project):
    first = project.run()
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    assert project.works()
    assert project.installations == 1

    second = project.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert project.installations == 1

    for extras in (["one"], ["two", "one"], [], ["one"], ["one", "two"]):
        assert project.run(*extras).returncode == 0
    assert project.installations == 3, "going back to extras that are installed already installs nothing"

    (project.root / "constraints.txt").write_text("tried==1\n")
    assert project.run().returncode == 0
    assert project.installations == 4
    (project.root / "constraints.txt").write_text("")
    assert project.run().returncode == 0
    assert project.installations == 5, "what the earlier files asked for is no longer what is installed"


def test_killed_half_way_it_starts_over(project):
    (project.root / "hold").touch()
    process = project.start()
    project.wait_for_installations(1)
    half_made = project.root / ".venv" / "half-made"
    half_made.touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    (project.root / "hold").unlink()

    finished = project.run()
    assert finished.returncode == 0, finished.stderr
    assert project.works()
    assert not half_made.exists()


def test_an_environment_without_pip_is_made_anew(project):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project.root / ".venv"], check=True)
    finished = project.run()
    assert finished.returncode == 0, finished.stderr
    assert project.works()


def test_two_at_once_set_up_once(project):
    (project.root / "hold").touch()
    first = project.start()
    project.wait_for_installations(1)
    second = project.start()
    assert "waiting for another setup" in second.stderr.readline()
    (project.root / "hold").unlink()
    assert first.wait(60) == 0
    assert second.wait(60) == 0
    assert project.works()
    assert project.installations == 1


def test_a_failing_installation_shows_its_output_and_keeps_the_environment(project):
    assert project.run().returncode == 0
    kept = project.root / ".venv" / "kept"
    kept.touch()
    (project.root / "broken").touch()
    finished = project.run("one")
    assert finished.returncode == 1
    assert "this build is broken" in finished.stderr
    assert "venv.sh: failed" in finished.stderr
    (project.root / "broken").unlink()
    assert project.run("one").returncode == 0
    assert kept.exists()


def test_without_a_suitable_python_it_says_what_it_needs(project):
    old = project.root / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    finished = project.run(PYTHON=str(old))
    assert finished.returncode == 1
    assert "needs python3, 3.10 or newer, with venv and pip" in finished.stderr
    assert str(old) in finished.stderr
    assert not (project.root / ".venv").exists()
