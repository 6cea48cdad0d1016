"""rankload.hub.load, list and help, and dist_hub_load: repositories from GitHub, once per job."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile

import pytest

from harness import checkpoints
from harness.fetch_calls import files_in
from harness.github import github

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="GitHub's names need a namespace: root"),
]

HUBCONF = '''
"""A hubconf.py with a module beside it."""

from parts import PART

dependencies = ["torch"]


def model(scale=1):
    """A small model."""
    return PART * scale


def weights(url):
    import torch

    return torch.hub.load_state_dict_from_url(url, progress=False)


def broken_on_rank_1():
    import os

    if os.environ["RANK"] == "1":
        raise LookupError("no such thing here")
    return 0


def _hidden():
    pass
'''
FILES = {"hubconf.py": HUBCONF, "parts/__init__.py": "PART = 7\n"}
NAME, COLD = (
    "owner/name",
    [
        "github.com/owner/name/tree/main/",
        "api.github.com/repos/owner/name/branches",
        "github.com/owner/name/zipball/main",
        "codeload.github.com/owner/name/legacy.zip/main",
    ],
)


@pytest.fixture
def hub(tmp_path):
    with github(tmp_path) as server:
        server.publish(NAME, FILES)
        yield server


@pytest.fixture
def home(tmp_path):
    return tmp_path / "torch"


@pytest.fixture
def run(hub, tmp_path, home):
    """Run a script in the network, with ``hub`` and ``report(value)`` in it; return what its ranks reported."""

    def run(body, ranks=1, *, env=None, module="rankload.hub", check=True):
        reports, script = tmp_path / "reports", tmp_path / "script.py"
        reports.mkdir(exist_ok=True)
        for old in reports.iterdir():
            old.unlink()
        script.write_text(
            "import json, os, pathlib, sys, warnings\n"
            "import torch\n"
            f"import {module} as hub\n"
            "import rankload\n"
            "rank = int(os.environ.get('RANK', 0))\n"
            "def report(value):\n"
            f"    pathlib.Path({str(reports)!r}, str(rank)).write_text(json.dumps(value))\n"
            "def error_of(function, *args, **kwargs):\n"
            "    try:\n"
            "        return function(*args, **kwargs)\n"
            "    except Exception as error:\n"
            "        return f'{type(error).__name__}: {error}'\n" + body
        )
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        variables = {"TORCH_HOME": str(home), "RANKLOAD_BACKOFF_SECONDS": "0.02", **(env or {})}
        result = hub.run(sys.executable, *torchrun, script, env=variables)
        if check:
            result.check()
        return [json.loads((reports / str(rank)).read_text()) for rank in range(ranks)]

    return run


def test_four_ranks_fetch_once_and_a_failure_is_shared(hub, run, home):
    results = run(
        "values = [hub.load('owner/name', 'model', trust_repo=True, verbose=False),\n"
        "          hub.load('owner/name', 'model', scale=2, verbose=False),\n"
        "          hub.list('owner/name', verbose=False), hub.help('owner/name', 'model'),\n"
        "          error_of(hub.load, 'owner/none', 'model', trust_repo=True),\n"
        "          error_of(hub.load, 'other/name', 'model')]\n"
        "report(values)\n",
        ranks=4,
    )
    for *values, missing, untrusted in results:
        assert values == [7, 14, ["broken_on_rank_1", "model", "weights"], "A small model."]
        assert missing.startswith("HTTPStatusError: HTTP Error 404: Not Found: https://api.github.com/repos/owner/none")
        assert untrusted.startswith("ArgumentError") and "trust_repo=True" in untrusted
    requests = hub.requests()
    assert requests[: len(COLD)] == COLD
    assert len(requests) - len(COLD) == len(set(requests[len(COLD) :])) == 2  # what the leader asked for owner/none
    assert sorted(path.name for path in (home / "hub").iterdir() if not path.name.startswith(".")) == [
        "owner_name_main",
        "trusted_list",
    ]
    assert (home / "hub" / "trusted_list").read_text().split()[0] == "owner_name"


def test_reloaded_once_per_job_and_call(hub, run):
    run("report(hub.load('owner/name', 'model', trust_repo=True))")
    hub.publish(NAME, {**FILES, "parts/__init__.py": "PART = 8\n"})
    before = len(hub.requests())
    results = run(
        "first = hub.load('owner/name', 'model', force_reload=True, skip_validation=True)\n"
        "sys.modules.pop('parts')\n"
        "report([first, hub.load('owner/name', 'model', force_reload=True, skip_validation=True)])\n",
        ranks=3,
    )
    assert results == [[8, 8]] * 3
    assert len(hub.requests()) - before == 2 * 3  # without the API


def test_torch_hub_and_rankload_use_each_others_repositories(hub, run):
    load = "report(hub.load('owner/name:main', 'model', trust_repo=True))"
    run(load)
    before = len(hub.requests())
    assert run(load, module="torch.hub") == [7]
    assert len(hub.requests()) == before
    hub.publish("owner/second", FILES)
    run("report(hub.load('owner/second', 'model', trust_repo=True))", module="torch.hub")
    before = len(hub.requests())
    assert run("report(hub.load('owner/second', 'model'))") == [7]
    assert len(hub.requests()) == before


def test_references(hub, run, home):
    hub.publish(NAME, {**FILES, "parts/__init__.py": "PART = 1\n"}, ref="old/branch")
    hub.publish(NAME, {**FILES, "parts/__init__.py": "PART = 2\n"}, ref="v2", ambiguous=True)
    hub.publish("owner/classic", {**FILES, "parts/__init__.py": "PART = 3\n"}, ref="master")
    [values] = run(
        "def fresh(name, **options):\n"
        "    sys.modules.pop('parts', None)\n"
        "    return error_of(hub.load, name, 'model', trust_repo=True, **options)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    values = [fresh('owner/name:old/branch'), fresh('owner/name:v2'), fresh('owner/classic')]\n"
        "values += ['ambiguous' in str(caught[0].message), fresh('owner/name:0123456'), fresh('owner/name:../../x')]\n"
        "report([*values, fresh('owner/name:ghost', skip_validation=True)])\n"
    )
    assert values[:4] == [1, 2, 3, True]
    assert "If it's a commit from a forked repo" in values[4] and values[4].startswith("ArgumentError")
    assert "expected owner/name or owner/name:ref" in values[5]
    assert "404" in values[6]
    assert {"owner_name_old_branch", "owner_name_v2", "owner_classic_master"} <= {
        path.name for path in (home / "hub").iterdir()
    }


def test_token_of_the_environment_that_github_refuses(hub, run):
    hub.require_token("right")
    load = "report(error_of(hub.load, 'owner/name', 'model', trust_repo=True))"
    assert run(load, env={"GITHUB_TOKEN": "right"}) == [7]
    hub.publish("owner/other", FILES)
    [message] = run(load.replace("owner/name", "owner/other"), env={"GITHUB_TOKEN": "wrong"})
    assert "401" in message and "wrong" not in message  # the pages come without it; the archive says what is wrong


@pytest.mark.fault(90)
@pytest.mark.parametrize("kind", ["escaping", "absolute", "two tops", "no zip", "bomb"])
def test_archive_that_is_refused_leaves_nothing(hub, run, home, kind):
    hub.replace_archive(NAME, _archive_of(kind))
    [message] = run("report(error_of(hub.load, 'owner/name', 'model', trust_repo=True))")
    assert "VerificationError" in message or "NotACheckpointError" in message
    assert files_in(home / "hub") == ["trusted_list"]


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o777])
def test_umask_lets_nobody_write_to_a_repository_who_may_not_write_beside_it(run, home, mode):
    """Its code runs. Containers often have an umask of 0."""
    directory = home / "hub"
    directory.mkdir(parents=True)
    directory.chmod(mode)
    run("os.umask(0)\nsys.dont_write_bytecode = True\nreport(hub.load('owner/name', 'model', trust_repo=True))")
    repository = directory / "owner_name_main"
    for path in (repository, *repository.rglob("*")):
        may_write = mode & 0o022 if path.is_dir() else 0
        assert path.stat().st_mode & 0o022 == may_write, path
    assert (directory / "trusted_list").stat().st_mode & 0o022 == mode & 0o022


def test_offline(run):
    [message] = run("report(error_of(hub.load, 'owner/name', 'model', trust_repo=True))", env={"RANKLOAD_OFFLINE": "1"})
    assert message.startswith("OfflineError: owner/name")


def test_nobody_to_ask(run):
    [message] = run("sys.stdin = open(os.devnull)\nreport(error_of(hub.load, 'owner/name', 'model'))")
    assert message.startswith("ArgumentError") and "trust_repo=True" in message


def test_what_an_entry_point_downloads_is_once_per_job(hub, run, tmp_path):
    path = checkpoints.write_zip(tmp_path / "source").path
    url = hub.add_file("owner/name/releases/download/1/weights.pth", path.read_bytes())
    results = run(
        "before = torch.hub.load_state_dict_from_url\n"
        f"found = hub.load('owner/name', 'weights', {url!r}, trust_repo=True)\n"
        f"again = rankload.dist_hub_load('owner/name', 'weights', {url!r})\n"
        "assert torch.hub.load_state_dict_from_url is before and found.keys() == again.keys()\n"
        "report(len(found))\n",
        ranks=3,
    )
    assert len(set(results)) == 1
    assert hub.requests("github.com").count("/owner/name/releases/download/1/weights.pth") == 1


def test_collective_form_raises_one_error_on_all_ranks(hub, run):
    results = run(
        "first = rankload.dist_hub_load('owner/name', 'model', trust_repo=True, verbose=False)\n"
        "report([first, error_of(rankload.dist_hub_load, 'owner/name', 'broken_on_rank_1'),\n"
        "        error_of(rankload.dist_hub_load, 'owner/none', 'model', trust_repo=True, skip_validation=True)])\n",
        ranks=3,
    )
    for first, broken, missing in results:
        assert first == 7
        assert "LookupError" in broken and "no such thing here" in broken
        assert "404" in missing
    assert hub.requests()[:4] == COLD and len(hub.requests()) == 4 + 2


def test_local_directory(tmp_path, run):
    for name, text in FILES.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    call = f"load({str(tmp_path / 'mine')!r}, 'model', source='local')"
    assert run(f"report([hub.{call}, rankload.dist_hub_{call}])") == [[7, 7]]


def _archive_of(kind):
    if kind == "no zip":
        return b"<html>log in</html>"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("top/hubconf.py", HUBCONF)
        name = {"escaping": "top/../../evil", "absolute": "/tmp/evil", "two tops": "other/x", "bomb": "top/big"}[kind]
        archive.writestr(name, bytes(80 << 20) if kind == "bomb" else "x")
    return buffer.getvalue()
