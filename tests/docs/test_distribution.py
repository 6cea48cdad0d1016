"""What is uploaded: an sdist with tests and docs, and a wheel that works without the checkout."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from docs.example_world import ROOT
from harness.scripts import run_program
from rankload import __version__

pytest.importorskip("build")

pytestmark = pytest.mark.xdist_group("distribution")  # one build, whatever the number of workers

_REPOSITORY = "https://code.example.org/rankload"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist and wheel; the wheel is built from the sdist, as `python -m build` does."""
    directory = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "rankload"
    _copy_of_the_repository(source)
    # Without isolation, which would download setuptools: the tests' environment has one that is new enough.
    run_program(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, source],
        env={"RANKLOAD_REPOSITORY_URL": _REPOSITORY},
        working_dir=directory,
    ).check()
    return directory


def _copy_of_the_repository(target: Path) -> None:
    """A build leaves folders in its source."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))


def _only(directory: Path, pattern: str) -> Path:
    [path] = directory.glob(pattern)
    return path


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name).decode()


def test_sdist_has_tests_and_docs(distributions: Path) -> None:
    with tarfile.open(_only(distributions, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = [
        "README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "mkdocs.yml",
        "constraints.txt",
        "docs/index.md",
        "tests/run.sh",
    ]
    expected += ["tests/docs/blocks.py", "launch/demo.sh", "launch/demo/__main__.py", "slurm/prefetch.sbatch"]
    assert set(expected) <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_wheel_has_the_package_and_nothing_else(distributions: Path) -> None:
    with zipfile.ZipFile(_only(distributions, "*.whl")) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"rankload"}
    assert "rankload/py.typed" in names


def test_package_index_shows_links_that_work(distributions: Path) -> None:
    metadata = _metadata(_only(distributions, "*.whl"))
    assert f"Project-URL: Repository, {_REPOSITORY}\n" in metadata
    assert "Description-Content-Type: text/markdown\n" in metadata
    targets = re.findall(r"\]\(([^()\s]+)\)", metadata)
    assert targets and all(target.startswith(_REPOSITORY) for target in targets)


def test_wheel_works_in_an_empty_environment(distributions: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    wheel = _only(distributions, "*.whl")
    run_program(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    ).check()
    # What it depends on is the tests' own: torch is large. No editable install comes along, for which a .pth of a .pth
    # would have to be read.
    paths = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    site_packages = _only(environment, "lib/python*/site-packages")
    (site_packages / "tests.pth").write_text("\n".join(paths) + "\n")

    alone = {"PYTHONPATH": None}
    code = "import rankload; print(rankload.__file__); from rankload import dist_load_into, hub"
    imported = run_program([python, "-c", code], env=alone, working_dir=tmp_path).check()
    assert imported.stdout.startswith(str(site_packages))
    shown = run_program([environment / "bin" / "rankload", "--help"], env=alone, working_dir=tmp_path).check()
    assert "prefetch" in shown.stdout
    version = run_program([environment / "bin" / "rankload", "--version"], env=alone, working_dir=tmp_path).check()
    assert version.stdout.strip() == wheel.name.split("-")[1]


def test_changelog_has_the_version_with_a_date() -> None:
    """The version in one place, and the changelog has it, with a date."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
