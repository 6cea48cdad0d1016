"""The patch replaces functions wherever they are bound, and puts them all back."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch.hub
import torch.utils.model_zoo

import rankload
from rankload._api.once_per_job import once_per_job
from rankload._patch.bindings import rebind
from rankload._patch.import_hook import ImportHook

NAMES = ("load_state_dict_from_url", "download_url_to_file", "load", "list", "help")


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    rankload.unpatch()


@pytest.fixture
def library(monkeypatch):
    """A module that has bound torch.hub's functions by name, as torchvision and timm do."""
    module = types.ModuleType("library_of_a_user")
    exec(
        "import functools\n"
        "from torch.hub import download_url_to_file, load_state_dict_from_url\n"
        "from torch.utils.model_zoo import load_url\n"
        "safe_load = functools.partial(load_state_dict_from_url, weights_only=True)\n",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def bound(module):
    partial = module.safe_load
    return [
        *(getattr(torch.hub, name) for name in NAMES),
        torch.utils.model_zoo.load_url,
        module.load_state_dict_from_url,
        module.download_url_to_file,
        module.load_url,
        partial,
        partial.func,
    ]


def test_every_binding_is_replaced_and_put_back(library):
    before = bound(library)
    with rankload.patch():
        during = bound(library)
        assert not any(one is other for one, other in zip(before, during, strict=True) if one is not before[-2])
        assert library.load_url is library.load_state_dict_from_url is torch.hub.load_state_dict_from_url
        assert library.safe_load.keywords == {"weights_only": True}
        assert library.safe_load is before[-2]  # others may hold it
    assert all(one is other for one, other in zip(before, bound(library), strict=True))


def test_binding_that_is_made_under_the_patch_is_put_back():
    original = torch.hub.load_state_dict_from_url
    module = types.ModuleType("late_library")
    with rankload.patch():
        module.load = torch.hub.load_state_dict_from_url
        sys.modules[module.__name__] = module
        assert module.load is not original
    del sys.modules[module.__name__]
    assert module.load is original


def test_contexts_that_overlap():
    """As of two threads: the first to leave takes nothing from the second."""
    original = torch.hub.load_state_dict_from_url
    first, second = rankload.patch(), rankload.patch()
    with second:
        with first:
            pass
        assert torch.hub.load_state_dict_from_url is not original
    assert torch.hub.load_state_dict_from_url is original


def test_launcher_whose_variables_contradict_each_other(monkeypatch):
    """Scripts that worked so far go on working."""
    monkeypatch.setenv("RANK", "3")
    with rankload.patch():
        assert once_per_job(lambda: 5, key="any", directory=Path("nowhere"), has_lease=False) == 5


def test_action_that_fails_does_not_spoil_the_import(tmp_path, monkeypatch, caplog):
    (tmp_path / "odd_library.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    hook = ImportHook({"odd_library": lambda module: module.what_it_lacks})
    hook.install()
    try:
        assert __import__("odd_library").VALUE == 1
    finally:
        hook.remove()
        sys.modules.pop("odd_library", None)
    assert "odd_library is left alone" in caplog.text


def test_patching_twice_and_unpatching_twice():
    original = torch.hub.load_state_dict_from_url
    rankload.patch()
    replaced = torch.hub.load_state_dict_from_url
    with rankload.patch():
        assert torch.hub.load_state_dict_from_url is replaced
    assert torch.hub.load_state_dict_from_url is replaced  # the outer one is still in force
    rankload.unpatch()
    rankload.unpatch()
    assert torch.hub.load_state_dict_from_url is original


@pytest.mark.parametrize("name", NAMES)
def test_replacement_has_the_signature_of_the_original(name):
    original = [
        (one.name, one.kind, one.default) for one in inspect.signature(getattr(torch.hub, name)).parameters.values()
    ]
    with rankload.patch():
        replaced = inspect.signature(getattr(torch.hub, name)).parameters.values()
        assert [(one.name, one.kind, one.default) for one in replaced] == original


def test_function_with_other_parameters_is_left_alone(monkeypatch, caplog):
    from rankload._patch import torch_hub

    def of_the_future(url, *, quantum=False):
        pass

    _, replacement = torch_hub._REPLACEMENTS["load_state_dict_from_url"]
    monkeypatch.setitem(torch_hub._REPLACEMENTS, "load_state_dict_from_url", (of_the_future, replacement))
    names = [name for name, _, _ in torch_hub.replacements()]
    assert names == [name for name in NAMES if name != "load_state_dict_from_url"]
    assert "is left alone" in caplog.text and "url quantum" in caplog.text


def test_module_with_odd_values_is_no_obstacle(monkeypatch):
    class Odd(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"{name} was asked for")

    odd = Odd("odd_module")
    odd.value = type("Raises", (), {"__eq__": lambda *_: 1 / 0})()
    monkeypatch.setitem(sys.modules, odd.__name__, odd)
    monkeypatch.setitem(sys.modules, "no_module", None)
    odd.function = before = lambda: 1
    odd.partial = functools.partial(before)
    assert rebind([(before, after := lambda: 2)]) == ["odd_module.function", "odd_module.partial"]
    assert odd.function is after and odd.partial() == 2


def test_hook_acts_after_the_import_and_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "hooked_module.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    hook = ImportHook({"hooked_module": lambda module: seen.append(module.VALUE)})
    hook.install()
    try:
        import hooked_module
    finally:
        hook.remove()
        sys.modules.pop("hooked_module", None)
    assert seen == [1]
    assert type(hooked_module.__loader__).__name__ == "SourceFileLoader"
    assert hooked_module.__spec__.loader is hooked_module.__loader__
    assert inspect.getsource(hooked_module) == "VALUE = 1\n"
    assert hook not in sys.meta_path


def test_the_patch_imports_no_library():
    code = (
        "import rankload, sys; rankload.patch(); "
        "sys.exit(any(name in sys.modules for name in ('huggingface_hub', 'open_clip')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
