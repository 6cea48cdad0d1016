"""What ``import rankload`` offers, and what it costs."""

import ast

import pytest

import rankload
from harness.scripts import run_script

CALLS = {
    "dist_fetch",
    "dist_hub_load",
    "dist_load_into",
    "dist_load_state_dict_from_url",
    "dist_once",
    "dist_snapshot",
    "load",
    "load_pretrained",
    "local_once",
    "open_checkpoint",
    "patch",
    "unpatch",
}
CLASSES = {"Checkpoint", "LoadReport", "TensorEntry"}
MODULES = {"adapt", "errors", "hub", "model_zoo"}
#: The others are in `rankload.errors`.
ERRORS = {
    "ArgumentError",
    "CacheError",
    "CoordinationError",
    "FetchError",
    "LoadError",
    "RankloadError",
    "VerificationError",
}


def test_list_of_names():
    """Adding or taking away a public name is a decision: make it here, too."""
    assert set(rankload.__all__) == CALLS | CLASSES | MODULES | ERRORS | {"__version__"}
    assert len(rankload.__all__) == len(set(rankload.__all__))
    assert set(dir(rankload)) == set(rankload.__all__)


@pytest.mark.parametrize("name", rankload.__all__)
def test_every_name_is_there(name):
    assert getattr(rankload, name) is not None


def test_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        rankload.load_everything  # noqa: B018


def test_every_call_is_documented():
    for name in CALLS:
        assert "ollective" in getattr(rankload, name).__doc__


def modules_after(code, *, env=None):
    result = run_script(f"import sys\n{code}\nprint(sorted(name.partition('.')[0] for name in sys.modules))", env=env)
    return set(ast.literal_eval(result.check().stdout))


def test_import_is_light():
    imported = modules_after("import rankload; rankload.CacheError; rankload.__version__")
    assert "rankload" in imported
    assert not imported & {"torch", "numpy", "requests", "urllib3", "filelock", "tqdm", "safetensors"}


@pytest.mark.parametrize("is_warm", [False, True])
def test_fetch_in_a_single_process_does_not_import_torch(origin, tmp_path, is_warm):
    url = origin.add("file.bin", b"content")
    if is_warm:
        rankload.dist_fetch(url, tmp_path)
    imported = modules_after(f"import rankload; rankload.dist_fetch({url!r}, {str(tmp_path)!r})")
    assert not imported & {"torch", "numpy", "safetensors"}
    assert ("requests" in imported) is not is_warm


@pytest.mark.parametrize("call", ["dist_fetch", "dist_load_state_dict_from_url", "load"])
def test_what_only_a_download_needs_is_not_imported_for_a_cached_or_local_file(origin, checkpoint, tmp_path, call):
    url = origin.add(checkpoint.name, checkpoint.path)
    rankload.dist_fetch(url, tmp_path)
    argument = str(checkpoint.path) if call == "load" else url
    directory = "" if call == "load" else f", {str(tmp_path)!r}"
    imported = modules_after(f"import rankload; rankload.{call}({argument!r}{directory})")
    assert "rankload" in imported
    assert not imported & {"requests", "urllib3", "filelock", "fsspec"}
