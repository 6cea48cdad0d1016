"""``rankload run``: the script sees what it would see without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from harness import checkpoints
from harness.scripts import run_torchrun

WHO_AM_I = """
import json, os, pickle, sys, __main__

class Here:
    pass

print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "main": sys.modules["__main__"].__dict__ is globals(), "pickled": type(pickle.loads(pickle.dumps(Here()))) is Here,
    "doc": __doc__, "cwd": os.getcwd(),
}))
"""


def python(*words, cwd, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def project(tmp_path):
    (tmp_path / "project" / "package").mkdir(parents=True)
    for name in ("script.py", "package/__init__.py", "package/tool.py"):
        (tmp_path / "project" / name).write_text("" if name.endswith("__init__.py") else f'"""What."""\n{WHO_AM_I}')
    return tmp_path / "project"


@pytest.mark.parametrize(
    "words", [["script.py", "-m", "--help", "a b"], ["-m", "package.tool", "--x"], ["./package/tool.py"]]
)
def test_script_sees_what_it_would_see_without(project, words):
    plain, patched = (python(*prefix, *words, cwd=project) for prefix in ([], ["-m", "rankload", "run"]))
    assert plain.returncode == patched.returncode == 0, patched.stderr
    assert json.loads(patched.stdout) == json.loads(plain.stdout)
    assert patched.stderr.startswith("rankload: patched torch.hub (load_state_dict_from_url, ")
    assert len(patched.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "exit_code", "text"),
    [("import sys; sys.exit(7)", 7, ""), ("1 / 0", 1, "ZeroDivisionError"), ("raise SystemExit('why')", 1, "why")],
)
def test_exit_code_is_the_scripts(tmp_path, code, exit_code, text):
    (tmp_path / "script.py").write_text(code)
    result = python("-m", "rankload", "run", "script.py", cwd=tmp_path)
    assert result.returncode == exit_code and text in result.stderr


def test_logging_is_the_scripts_to_configure(tmp_path):
    (tmp_path / "script.py").write_text(
        "import logging; logging.basicConfig(format='mine %(message)s'); logging.warning('x')"
    )
    assert "mine x" in python("-m", "rankload", "run", "script.py", cwd=tmp_path).stderr


@pytest.mark.parametrize(("words", "exit_code"), [([], 2), (["-m"], 2), (["--help"], 0), (["missing.py"], 2)])
def test_nothing_to_run(tmp_path, words, exit_code):
    result = python("-m", "rankload", "run", *words, cwd=tmp_path)
    assert result.returncode == exit_code
    assert "usage: " in result.stderr or "cannot open file 'missing.py'" in result.stderr


def test_children_of_multiprocessing_find_the_script(tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "def double(x):\n"
        "    return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [1, 2]))\n"
    )
    assert python("-m", "rankload", "run", "script.py", cwd=tmp_path).stdout == "[2, 4]\n"


SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from torch.hub import download_url_to_file, load_state_dict_from_url
dist.init_process_group("gloo")
rank, style, url, path = dist.get_rank(), *sys.argv[1:]
if style == "barrier":  # mmengine
    if rank == 0:
        found = load_state_dict_from_url(url, progress=False)
    dist.barrier()
    found = load_state_dict_from_url(url, progress=False)
elif style == "main only":  # DETR
    found = load_state_dict_from_url(url, progress=False) if rank == 0 else {}
elif style == "file":
    download_url_to_file(url, path, progress=False)
    found = torch.load(path)
else:
    found = load_state_dict_from_url(url, progress=False)
dist.barrier()
print(rank, len(found))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("style", ["neither", "barrier", "main only", "file"])
def test_four_ranks_download_once(origin, tmp_path, style):
    """And no rank waits for another one: the script's own barriers are all that there is."""
    checkpoint = checkpoints.write_zip(tmp_path / "source")
    url, script = origin.add(checkpoint.name, checkpoint.path), tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {"TORCH_HOME": str(tmp_path / "home")}
    words = ["run", script, style, url, tmp_path / "file.pth"]
    result = run_torchrun("rankload", 4, *words, options=("--standalone", "--module"), env=environment).check()
    sizes = dict(tuple(map(int, out.split())) for out, _ in result.worker_streams.values())
    count = len(torch.load(checkpoint.path))
    assert sizes == {rank: 0 if style == "main only" and rank else count for rank in range(4)}
    assert origin.request_count() == 1
    assert origin.bytes_sent() == checkpoint.path.stat().st_size
