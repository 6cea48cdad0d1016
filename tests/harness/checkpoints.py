"""Real checkpoint files, small ones of every format and big ones of any size.

All are written by torch or safetensors themselves. Each writer returns a ``CheckpointFile`` whose name
carries the file's hash prefix, as the model zoos name theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class CheckpointFile:
    """A file and what it holds.

    Attributes:
        content: The object that was saved. Of a big file it is empty.
    """

    path: Path
    sha256: str
    content: Any

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def state_dict() -> OrderedDict[str, torch.Tensor]:
    """A few tensors of several types and layouts: a transposed view, an empty one, a 0-dim one, tied ones."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(64, 48, generator=generator)
    return OrderedDict(
        {
            "head.weight": shared,
            "body.weight": torch.randn(33, 17, generator=generator).to(torch.bfloat16),
            "body.bias": torch.randn(17, generator=generator),
            "norm.num_batches_tracked": torch.tensor(1234),
            "embedding.weight": shared,  # tied: the same storage twice
            "transposed": torch.randn(5, 9, generator=generator).t(),
            "window": shared[3:7],  # a view into the tied storage, at an offset
            "indices": torch.arange(100, dtype=torch.int64),
            "mask": torch.rand(31, generator=generator) > 0.5,
            "empty": torch.empty(0, 3),
        }
    )


def training_checkpoint() -> dict[str, Any]:
    """What a training script saves: model and optimizer after two real steps, counters, names."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    weights = model.state_dict()
    return {
        "zeta": "keys are not sorted",
        "epoch": 3,
        "model": weights,
        "optimizer": optimizer.state_dict(),  # its steps are 0-dim tensors
        "ema": OrderedDict((name, weights[name]) for name in reversed(weights)),  # tied to the model's
        "best": 0.25,
        "history": [(1, 2.5), (2, None)],
        "shape": torch.Size([4, 12]),
        "alpha": {"nested": {"flag": True, "tensor": torch.tensor(2.5)}},
    }


def write_zip(directory: Path, content: Any = None, stem: str = "model") -> CheckpointFile:
    """The format of torch.save since 1.6."""
    return _write(directory, content, stem, ".pth", torch.save)


def write_legacy(directory: Path, content: Any = None, stem: str = "legacy") -> CheckpointFile:
    """The format of torch.save before 1.6, in which many files on the web still are."""
    return _write(
        directory,
        content,
        stem,
        ".pth",
        lambda saved, path: torch.save(saved, path, _use_new_zipfile_serialization=False),
    )


def write_legacy_zip(directory: Path, content: Any = None, stem: str = "packed") -> CheckpointFile:
    """A zip file with a legacy checkpoint as its only member, which torch.hub unpacks."""

    def save(saved: Any, path: Path) -> None:
        inner = path.with_name("inner.pth")
        torch.save(saved, inner, _use_new_zipfile_serialization=False)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(inner, f"{stem}.pth")
        inner.unlink()

    return _write(directory, content, stem, ".zip", save)


def write_safetensors(
    directory: Path, content: Mapping[str, torch.Tensor] | None = None, stem: str = "model"
) -> CheckpointFile:
    """A safetensors file. It knows neither views nor ties: tensors are written contiguous and apart."""
    from safetensors.torch import save_file

    if content is None:
        content = state_dict()
    apart = {name: tensor.contiguous().clone() for name, tensor in content.items()}
    return _write(directory, apart, stem, ".safetensors", save_file)


def write_tagged(
    directory: Path, devices: Mapping[str, str], *, is_legacy: bool = False, stem: str = "tagged"
) -> CheckpointFile:
    """A checkpoint whose storages say that they were saved on other devices, though made on a CPU.

    Args:
        devices: Name of the tensor -> location tag, such as ``{"a": "cuda:0", "b": "cuda:1", "c": "cpu"}``.
    """
    content = OrderedDict((name, torch.full((16,), float(index))) for index, name in enumerate(devices))
    tags = {content[name].untyped_storage().data_ptr(): tag for name, tag in devices.items()}
    with _location_tags(tags):
        return (write_legacy if is_legacy else write_zip)(directory, content, stem)


def write_big(directory: Path, size_bytes: int, stem: str = "big") -> CheckpointFile:
    """A zip checkpoint of bfloat16 tensors of 8 MiB, all different, ``size_bytes`` long in all."""
    block = torch.randn(_BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    count = max(1, round(size_bytes / _BLOCK_BYTES))
    content = OrderedDict((f"layers.{index}.weight", block.roll(index).view(2048, -1)) for index in range(count))
    written = write_zip(directory, content, stem)
    return CheckpointFile(written.path, written.sha256, None)  # or the test would keep all of it in memory


def location_tags(path: Path) -> set[str]:
    """The location tags in a file, as torch.load hands them to a callable map_location."""
    seen: set[str] = set()

    def note(storage: Any, tag: str) -> Any:
        seen.add(tag)
        return storage

    torch.load(path, map_location=note, weights_only=True)
    return seen


def assert_same(actual: Any, expected: Any, where: str = "checkpoint") -> None:
    """Asserts equality of nested checkpoints: types, key order, values, strides, and which tensors are tied."""
    _assert_same(actual, expected, where)
    assert _ties(actual) == _ties(expected), f"{where}: other tensors share storage"


def digest_of(content: Any) -> str:
    """SHA-256 over names, types, shapes, strides and bytes: ranks compare this instead of sending tensors."""
    hasher = hashlib.sha256()
    for where, leaf in _leaves(content):
        if isinstance(leaf, torch.Tensor):
            raw: Any = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if leaf.numel() else b""
            hasher.update(f"{where} {leaf.dtype} {tuple(leaf.shape)} {leaf.stride()}".encode())
            hasher.update(raw)
        else:
            hasher.update(f"{where} {leaf!r}".encode())
    return hasher.hexdigest()


def with_hash_prefix(path: Path) -> CheckpointFile:
    """Renames ``name.ext`` to ``name-<first 8 hex digits of its SHA-256>.ext``."""
    with path.open("rb") as file:
        sha256 = _sha256(file)
    return CheckpointFile(path.rename(path.with_name(f"{path.stem}-{sha256[:8]}{path.suffix}")), sha256, None)


def _write(directory: Path, content: Any, stem: str, suffix: str, save: Any) -> CheckpointFile:
    saved = state_dict() if content is None else content
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem}{suffix}"
    save(saved, path)
    named = with_hash_prefix(path)
    return CheckpointFile(named.path, named.sha256, saved)


def _sha256(file: Any) -> str:
    hasher = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        hasher.update(block)
    return hasher.hexdigest()


_tags_by_address: dict[int, str] = {}


@contextlib.contextmanager
def _location_tags(tags: Mapping[int, str]) -> Iterator[None]:
    # torch has no way to unregister: registered once, and silent while nothing is being tagged.
    if not _location_tags.is_registered:  # type: ignore[attr-defined]
        # Before the CPU's own tagger, which has priority 10; restoring stays with torch's own.
        torch.serialization.register_package(
            5, lambda storage: _tags_by_address.get(storage.data_ptr()), lambda storage, tag: None
        )
        _location_tags.is_registered = True  # type: ignore[attr-defined]
    _tags_by_address.update(tags)
    try:
        yield
    finally:
        _tags_by_address.clear()


_location_tags.is_registered = False  # type: ignore[attr-defined]


def _assert_same(actual: Any, expected: Any, where: str) -> None:
    assert type(actual) is type(expected), f"{where}: {type(actual)} is not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        for aspect in ("dtype", "shape", "requires_grad", "device"):
            ours, theirs = getattr(actual, aspect), getattr(expected, aspect)
            assert ours == theirs, f"{where}: {aspect} {ours} is not {theirs}"
        assert actual.stride() == expected.stride(), f"{where}: stride {actual.stride()} is not {expected.stride()}"
        assert _have_equal_values(actual, expected), f"{where}: values differ"
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{where}: keys {list(actual)} are not {list(expected)}"
        for key in expected:
            _assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: {len(actual)} items are not {len(expected)}"
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            _assert_same(ours, theirs, f"{where}[{index}]")
    else:
        is_nan = actual != actual and expected != expected
        assert is_nan or actual == expected, f"{where}: {actual!r} is not {expected!r}"


def _have_equal_values(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if torch.equal(actual, expected) or not expected.is_floating_point():
        return torch.equal(actual, expected)
    are_nan = torch.equal(actual.isnan(), expected.isnan())
    return are_nan and torch.equal(actual.nan_to_num(), expected.nan_to_num())


def _leaves(content: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{where}[{key!r}]")
    elif isinstance(content, list | tuple) and not isinstance(content, torch.Size):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{where}[{index}]")
    else:
        yield where, content


def _ties(content: Any) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for where, leaf in _leaves(content):
        if isinstance(leaf, torch.Tensor) and leaf.numel():
            groups.setdefault(leaf.untyped_storage().data_ptr(), []).append(where)
    return [names for names in groups.values() if len(names) > 1]
