"""Every kind of module, loaded in every way: torch is the judge."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import rankload
from harness.alike import assert_alike
from harness.module_kinds import KINDS, Kind

pytestmark = pytest.mark.filterwarnings("ignore")  # of quantisation, weight norm and sparse tensors, which are old


@dataclass(frozen=True)
class Way:
    """One way to load, and torch's own that is the same.

    Attributes:
        load: gets the module, the path, and ``weights_only``.
        judge: gets the module, and what torch.load has returned.
        is_meta: the module is on the meta device.
    """

    load: Callable[[nn.Module, str, bool], Any]
    judge: Callable[[nn.Module, Any], Any] = lambda module, state_dict: module.load_state_dict(state_dict)
    is_meta: bool = False


def _dist(module: nn.Module, path: str, weights_only: bool) -> Any:
    return module.load_state_dict(rankload.dist_load_state_dict_from_url(path, weights_only=weights_only))


def _load(module: nn.Module, path: str, weights_only: bool) -> Any:
    return module.load_state_dict(rankload.load(path, weights_only=weights_only))


def _into(**keywords: Any) -> Callable[[nn.Module, str, bool], Any]:
    return lambda module, path, weights_only: rankload.dist_load_into(
        module, path, weights_only=weights_only, **keywords
    )


def _judge(**keywords: Any) -> Callable[[nn.Module, Any], Any]:
    return lambda module, state_dict: module.load_state_dict(state_dict, **keywords)


WAYS = {
    "dist": Way(_dist),
    "load": Way(_load),
    "into": Way(_into()),
    "into, not strict": Way(_into(strict=False), _judge(strict=False)),
    "into, assign": Way(_into(assign=True), _judge(assign=True)),
    "into meta": Way(_into(), _judge(assign=True), is_meta=True),
    "into private copies": Way(_into(mmap=False)),
}


#: What torch refuses, and rankload does not: there is nothing to assign.
BETTER = {("into, assign", "lazy")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Save each kind once."""
    directory = tmp_path_factory.mktemp("kinds")
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"

    def file(kind: str) -> str:
        path = directory / f"{zlib.crc32(kind.encode())}.pth"
        if not path.exists():
            torch.manual_seed(1)
            torch.save(KINDS[kind].saved(), path)
        return str(path)

    yield file
    torch.backends.quantized.engine = engine


def _target(kind: Kind, *, is_meta: bool) -> nn.Module:
    torch.manual_seed(2)
    if not is_meta:
        return kind.target()
    with torch.device("meta"):
        return kind.target().to("meta")


def _outcome(load: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return load(), None
    except Exception as error:
        return None, error


def _objects(module: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return {**found, **dict(module.named_buffers(remove_duplicate=False))}


def _compare(actual: nn.Module, expected: nn.Module) -> None:
    assert_alike(actual.state_dict(), expected.state_dict())
    ours, theirs = _objects(actual), _objects(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert type(ours[name]) is type(tensor), f"{name}: {type(ours[name])}, not {type(tensor)}"
        if not is_lazy(tensor) and not tensor.is_meta:
            assert ours[name].requires_grad == tensor.requires_grad, name
    for name in ("state", "kept", "loads"):  # what hooks and overrides have got
        assert_alike(getattr(actual, name, None), getattr(expected, name, None), name)


def _keys_in(error: BaseException) -> set[str]:
    """Return the names of tensors in torch's message."""
    text = str(error)
    lists = re.findall(r"(?:Missing|Unexpected) key\(s\) in state_dict: (.*)\.", text)
    found = {name for line in lists for name in re.findall(r'"([^"]+)"', line)}
    for pattern in (r"size mismatch for ([\w.]+)", r'parameter named "([^"]+)"'):
        found.update(re.findall(pattern, text))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_module_is_what_torch_makes_of_it(files: Callable[[str], str], way: str, kind: str) -> None:
    of_kind, of_way, path = KINDS[kind], WAYS[way], files(kind)
    if (of_way.is_meta and not of_kind.has_meta) or (way, kind) in BETTER:
        return
    weights_only = not of_kind.is_unsafe
    actual, expected = (_target(of_kind, is_meta=of_way.is_meta) for _ in range(2))
    before = _objects(actual), _objects(expected)
    theirs, refusal = _outcome(lambda: of_way.judge(expected, torch.load(path, weights_only=weights_only)))
    ours, error = _outcome(lambda: of_way.load(actual, path, weights_only))
    if refusal is not None:
        assert error is not None, f"torch raises {refusal!r}"
        assert isinstance(error, RuntimeError), f"{error!r}, not {refusal!r}"
        assert all(key in str(error) for key in _keys_in(refusal)), f"{error}, not {refusal}"
        untouched = _target(of_kind, is_meta=of_way.is_meta)
        if way.startswith("into"):
            _compare(actual, untouched)  # nothing is written
        return
    assert error is None, f"{error!r}"
    _compare(actual, expected)
    assert [*map(sorted, ours)] == [*map(sorted, theirs)]
    if not of_way.is_meta:
        kept, wanted = ({name: old[name] is tensor for name, tensor in _objects(module).items()}
                        for old, module in zip(before, (actual, expected), strict=True))  # fmt: skip
        assert kept == wanted, "the same tensors are written into, and the same are replaced"


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_an_opened_checkpoint(files: Callable[[str], str], kind: str) -> None:
    """Those that are plain are what torch.load returns; what only torch.load builds is listed apart."""
    path, of_kind = files(kind), KINDS[kind]
    expected = torch.load(path, weights_only=not of_kind.is_unsafe)
    with rankload.open_checkpoint(path) as checkpoint:
        for name, tensor in expected.items():
            if type(tensor) is torch.Tensor and name in checkpoint:
                assert_alike(checkpoint[name], tensor, name)
        assert {name.split(".")[0] for name in expected} == {
            name.split(".")[0] for name in (*checkpoint, *checkpoint.remainder)
        }
