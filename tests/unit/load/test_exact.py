"""Code of the user's finds in a checkpoint exactly what torch.load returns, types included."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.alike import assert_alike
from rankload import adapt, dist_load_into, open_checkpoint
from rankload.errors import UnsafePickleError

Pair = namedtuple("Pair", ["first", "second"])


def with_attribute() -> Any:
    content = OrderedDict(a=1)
    content.note = "text"  # type: ignore[attr-defined]
    return content


def with_tensor_as_attribute() -> Any:
    content = OrderedDict(a=1)
    content.note = torch.ones(2)  # type: ignore[attr-defined]
    return content


def sharing() -> Any:
    base = torch.arange(6.0)
    return {"base": base, "view": base[2:4], "again": base}


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.arange(4.0), 0.1, 3, torch.quint8)


VALUES: dict[str, Callable[[], Any]] = {
    "shape": lambda: torch.Size([2, 3]),
    "device": lambda: torch.device("cuda", 1),
    "dtype": lambda: torch.bfloat16,
    "counter": lambda: Counter("aab"),
    "empty counter": Counter,
    "ordered": lambda: OrderedDict(b=1, a=OrderedDict()),
    "attribute": with_attribute,
    "tensor as attribute": with_tensor_as_attribute,
    "set": lambda: {1, 2},
    "complex": lambda: 1 + 2j,
    "bytes": lambda: b"\x00\xff" * 50,
    "bytearray": lambda: bytearray(b"abc"),
    "parameter": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
    "requires grad": lambda: torch.ones(2, requires_grad=True),
    "quantised": quantised,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex tensor": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "sharing": sharing,
    "layout": lambda: torch.sparse_coo,
    "scheme": lambda: torch.per_tensor_affine,
    "big number": lambda: 2**200,
    "none": lambda: None,
    "text": lambda: "naïve \u20ac",
}
UNSAFE: dict[str, Callable[[], Any]] = {
    "default dict": lambda: defaultdict(list, a=[1]),
    "default dict of tensors": lambda: defaultdict(dict, a={"t": torch.ones(2)}),
    "named tuple": lambda: Pair(torch.ones(2), 1),
    "slice": lambda: slice(1, 2),
    "frozen set": lambda: frozenset({1}),
    "range": lambda: range(3),
    "tensor class": lambda: torch.ones(2).as_subclass(Named),
}
ALLOWED = [defaultdict, list, dict, Pair, slice, frozenset, range]


class Named(torch.Tensor):
    """A tensor of a class of its own."""


NESTINGS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda value: value,
    "dict": lambda value: {"a": {"b": value}},
    "list": lambda value: [[value], value],
    "tuple": lambda value: (1, (value,)),
    "counter": lambda value: OrderedDict(a=value, b=Counter("xy")),
}


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.state: Any = None

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        vars(self)["state"] = state  # a parameter, too, is only a value here


class Popping(nn.Linear):
    """Keeps a value in its state dict, as quantised modules keep dtypes and packed weights."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.state: Any = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}kept"] = self.state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        vars(self)["state"] = state_dict.pop(f"{prefix}kept")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Looking(nn.Linear):
    """Its hook looks at the whole state dict."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.state: Any = None
        self.saved: Any = None
        self.register_state_dict_post_hook(self._add)
        self.register_load_state_dict_pre_hook(self._look)

    @staticmethod
    def _add(module: Any, state_dict: Any, prefix: str, _: Any) -> None:
        state_dict[f"{prefix}kept"] = module.state

    @staticmethod
    def _look(module: Any, state_dict: Any, prefix: str, *_: Any) -> None:
        assert all(type(value) is torch.Tensor for name, value in state_dict.items() if not name.endswith("kept"))
        vars(module)["state"] = state_dict.pop(f"{prefix}kept")


MODULES = (WithExtraState, Popping, Looking)


def check(kind: type[Any], value: Any, path: Path, *, write: Any = torch.save, is_safe: bool = True) -> None:
    source = kind()
    vars(source)["state"] = value
    module = nn.Sequential(OrderedDict(a=source))
    write(module.state_dict(), path)
    loaded = torch.load(path, weights_only=is_safe)
    expected, actual = (nn.Sequential(OrderedDict(a=kind())) for _ in range(2))
    expected.load_state_dict(loaded)
    dist_load_into(actual, path, weights_only=is_safe)
    assert_alike(actual.a.state, expected.a.state)
    assert torch.equal(actual.a.weight, expected.a.weight)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", MODULES)
def test_values(tmp_path: Path, kind: type[Any], value: str) -> None:
    for nested in NESTINGS.values():
        check(kind, nested(VALUES[value]()), tmp_path / "file.pth")


@pytest.mark.parametrize("value", UNSAFE)
@pytest.mark.parametrize("kind", MODULES)
def test_values_of_classes_that_weights_only_refuses(tmp_path: Path, kind: type[Any], value: str) -> None:
    check(kind, {"nested": [UNSAFE[value]()]}, tmp_path / "file.pth", is_safe=False)


@pytest.mark.parametrize("value", ["named tuple", "frozen set"])
def test_values_of_classes_that_are_allowed(tmp_path: Path, value: str) -> None:
    with torch.serialization.safe_globals([*ALLOWED]):
        check(Popping, UNSAFE[value](), tmp_path / "file.pth")


def test_values_of_refused_classes_are_refused(tmp_path: Path) -> None:
    source = Popping()
    source.state = Pair(1, 2)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    with pytest.raises(UnsafePickleError, match="Pair"):
        dist_load_into(Popping(), tmp_path / "file.pth")


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("value", ["shape", "counter", "sparse", "sharing"])
def test_values_in_legacy_files(tmp_path: Path, kind: type[Any], value: str) -> None:
    def write(content: Any, path: Path) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=False)

    check(kind, {"x": VALUES[value]()}, tmp_path / "file.pth", write=write)


def test_objects_that_no_code_looks_at_are_not_built(tmp_path: Path) -> None:
    """A training checkpoint of a class that nobody has, around a plain state dict."""
    module = nn.Linear(2, 2)
    torch.save({"state_dict": module.state_dict(), "args": Pair(1, 2)}, tmp_path / "file.pth")
    for kind in (nn.Linear(2, 2), Renaming()):
        dist_load_into(kind, tmp_path / "file.pth", adapt=adapt.unwrap())
        assert torch.equal(kind.weight, module.weight)


class Renaming(nn.Linear):
    """Its code looks at tensors, and gets tensors, without torch.load's help."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        assert all(type(value) is torch.Tensor for value in state_dict.values())
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_hooks_of_copied_modules(tmp_path: Path) -> None:
    source = Looking()
    source.state = torch.Size([2])
    torch.save(source.state_dict(), tmp_path / "file.pth")
    module = copy.deepcopy(source)
    module.state = None
    dist_load_into(module, tmp_path / "file.pth")
    assert_alike(module.state, torch.Size([2]))


def test_extra_state_of_one_object_stays_one(tmp_path: Path) -> None:
    shared = {"shape": torch.Size([1])}
    source = nn.Sequential(WithExtraState(), WithExtraState())
    for part in source:
        part.state = shared
    torch.save(source.state_dict(), tmp_path / "file.pth")
    module = nn.Sequential(WithExtraState(), WithExtraState())
    dist_load_into(module, tmp_path / "file.pth")
    assert module[0].state is module[1].state and module[0].state == shared


def test_what_an_opened_checkpoint_has_besides_tensors(tmp_path: Path) -> None:
    content = {
        "shape": torch.Size([2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "list": [torch.Size([1]), torch.int8],
        "counts": Counter("aab"),
        "lists": defaultdict(list, a=[1]),
        "weight": torch.ones(1),
    }
    torch.save(content, tmp_path / "file.pth")
    with open_checkpoint(tmp_path / "file.pth") as checkpoint:
        found = checkpoint.remainder
    assert found == {
        "shape": torch.Size([2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "list": [torch.Size([1]), torch.int8],
        "counts.a": 2,
        "counts.b": 1,
        "lists.a": [1],
    }
    assert type(found["shape"]) is torch.Size and type(found["list"][0]) is torch.Size
