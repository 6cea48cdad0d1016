"""Contents of checkpoints of many kinds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from harness.checkpoints import training_checkpoint


def with_metadata() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()


def nested() -> Any:
    shared = {"weight": torch.ones(3)}
    return [shared, {"again": shared, 5: torch.arange(6).view(2, 3).t(), ("a", 1): None}, [], (1, (2.5, "b")), -(2**70)]


def holding_itself() -> Any:
    content: dict[str, Any] = {"weight": torch.ones(3)}
    content["self"] = [content]
    return content


def views() -> Any:
    base = torch.randn(6, 7)
    return {"base": base, "tied": base, "row": base[2], "column": base[:, 3], "flipped": base.t(), "end": base[5, 6:]}


def every_dtype() -> Any:
    bits = torch.tensor([0, 1, 2, 3, 60, 0, 0, 1], dtype=torch.uint8)
    names = ("bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 "
             "float8_e4m3fn float8_e5m2")  # fmt: skip
    dtypes = [getattr(torch, name) for name in names.split()]
    return {str(dtype): bits > 1 if dtype is torch.bool else bits.view(dtype).clone() for dtype in dtypes}


def with_attribute() -> Any:
    content = with_metadata()
    content.note = "an attribute"
    return content


#: Plain tensors and plain values.
PLAIN: dict[str, Callable[[], Any]] = {
    "state dict": with_metadata,
    "training": training_checkpoint,
    "nested": nested,
    "views": views,
    "dtypes": every_dtype,
    "parameters": lambda: {
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True),
    },
    "one tensor": lambda: torch.randn(4),
    "no tensor": lambda: {"epoch": 3},
    "empty": dict,
    "empty tensors": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.tensor(1.5)},
    "torch's values": lambda: OrderedDict(
        shape=torch.Size([2, 3]), dtype=torch.bfloat16, device=torch.device("cuda", 1), weight=torch.ones(2)
    ),
    "attributes of a dict": with_attribute,
    "text": lambda: {"naïve 🜁": torch.ones(1), "": "\u20ac", "long": "x" * 70000},
    "many": lambda: {f"layer.{number}": torch.full((2,), float(number)) for number in range(600)},
}


def in_other_order() -> Any:
    content = OrderedDict(weight=torch.ones(2))
    content.note = ["an attribute"]  # type: ignore[attr-defined]
    return content


class Odd(torch.Tensor):
    """A tensor of a class of its own."""


#: Others: objects, and tensors of other layouts and classes.
OTHER: dict[str, Callable[[], Any]] = {
    "conjugated": lambda: {"x": torch.randn(3, dtype=torch.complex64).conj()},
    "negated": lambda: {"x": torch._neg_view(torch.randn(3))},  # type: ignore[attr-defined]
    "tuple of tensors": lambda: {"state": (torch.ones(2), torch.zeros(2))},
    "counter": lambda: {"counts": Counter("abca"), "weight": torch.ones(2)},
    "set": lambda: {"names": {"a"}, "weight": torch.ones(2)},
    "attributes of a dict": in_other_order,
    "surrogates": lambda: {"\udc80": torch.ones(1)},
    "sparse": lambda: {"x": torch.eye(3).to_sparse()},
    "bytes": lambda: {"hash": b"\x00\xff", "x": torch.ones(1)},
    "subclass": lambda: {"x": torch.ones(3).as_subclass(Odd)},
}
