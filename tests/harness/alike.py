"""Whether two values are alike, down to types: for comparing what rankload returns with what torch returns."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def assert_alike(actual: Any, expected: Any, where: str = "value") -> None:
    """Assert that nested values have the same types, orders of keys, attributes and elements."""
    assert type(actual) is type(expected), f"{where}: {type(actual)}, not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        _assert_same_tensor(actual, expected, where)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: other keys: {list(actual)}, not {list(expected)}"
        for key in expected:
            assert_alike(actual[key], expected[key], f"{where}[{key!r}]")
        assert_alike(getattr(actual, "default_factory", None), getattr(expected, "default_factory", None), where)
        assert_alike(getattr(actual, "__dict__", None), getattr(expected, "__dict__", None), f"{where}.__dict__")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} items, not {len(expected)}"
        for number, pair in enumerate(zip(actual, expected, strict=True)):
            assert_alike(*pair, f"{where}[{number}]")
    elif not isinstance(expected, torch.ScriptObject):  # which cannot be compared
        assert actual == expected or repr(actual) == repr(expected), f"{where}: {actual!r}, not {expected!r}"


def _assert_same_tensor(actual: Any, expected: Any, where: str) -> None:
    if is_lazy(expected):
        return
    for aspect in ("dtype", "shape", "device", "layout", "requires_grad", "is_quantized"):
        found, wanted = getattr(actual, aspect), getattr(expected, aspect)
        assert found == wanted, f"{where}.{aspect}: {found}, not {wanted}"
    if not expected.is_meta:
        assert _elements(actual) == _elements(expected), f"{where}: other elements"
    assert getattr(actual, "__dict__", {}).keys() == getattr(expected, "__dict__", {}).keys(), f"{where}: attributes"


def _elements(tensor: torch.Tensor) -> str:
    """Return the elements as text: NaNs are alike, and so are those of any layout."""
    plain: Any = tensor.detach()
    if plain.is_quantized:
        return repr(plain)
    if not is_traceable_wrapper_subclass(plain) and plain.layout != torch.strided:
        plain = plain.to_dense()
    if is_traceable_wrapper_subclass(plain) or type(plain).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return repr(plain)
    plain = plain.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not plain.dtype.is_complex and plain.dtype != torch.bool:
        plain = plain.view(torch.uint8) if plain.numel() else plain
    return str(plain.tolist())
