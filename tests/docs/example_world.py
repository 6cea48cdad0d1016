"""What the pages' addresses and paths stand for in a test: one table."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import stat
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from docs.my_model import Model
from harness import checkpoints
from harness.origin import Origin

DOCS_TESTS = Path(__file__).resolve().parent
ROOT = DOCS_TESTS.parents[1]

TOKEN = "a-secret"

#: Programs that the pages call, and what runs them here.
_PROGRAMS = {
    "python": [sys.executable],
    "rankload": [sys.executable, "-m", "rankload"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}


@dataclass(frozen=True)
class World:
    """Where a page's blocks run.

    Attributes:
        texts: what a page says → what it means here, the longest first.
        directory: the current directory of all blocks.
        environment: variables over those of the test.
    """

    texts: Mapping[str, str]
    directory: Path
    environment: Mapping[str, str]

    def translated(self, text: str) -> str:
        """A block with what its placeholders stand for."""
        for said, meant in sorted(self.texts.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(said, meant)
        return text


def make_world(origin: Origin, directory: Path) -> World:
    """Put files where the pages say that they are."""
    torch.manual_seed(7)
    model = Model()
    weights = model.state_dict()
    sources = directory / "sources"
    saved = checkpoints.write_zip(sources, weights, "model")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    training = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    wrapped = checkpoints.write_zip(
        sources, {"state_dict": {f"module.{name}": weights[name] for name in weights}}, "ddp"
    )
    safe = checkpoints.write_safetensors(sources, weights, "model")

    prefix = saved.sha256[:8]
    for name in (f"resnet50-{prefix}.pth", f"model-{prefix}.pth"):
        origin.add(name, saved.path)
    origin.add(f"model-{prefix}.pth.sha256", f"{saved.sha256}  model-{prefix}.pth\n".encode())
    origin.add(f"private/model-{prefix}.pth", saved.path, required_headers={"Authorization": f"Bearer {TOKEN}"})
    dragonfly = {"X-Dragonfly-Registry": "https://example.org"}
    origin.add(f"dragonfly/model-{prefix}.pth", saved.path, required_headers=dragonfly)
    origin.add("ddp.pth", wrapped.path)
    origin.add("model.safetensors", safe.path)
    origin.add("vocabulary.txt", b"a\nb\n")
    origin.add("images.tar", _tar({"labels.txt": b"cat\n", "0.bin": bytes(100)}))
    _add_several_files(origin, weights, sources)

    here = directory / "here"
    for folder in (here / "shared" / "weights", here / "shared" / "runs" / "7", here / "local" / "weights"):
        folder.mkdir(parents=True)
    torch.save(training, here / "shared" / "runs" / "7" / "last.pth")
    checkpoints.write_safetensors(sources / "shared", weights, "model").path.rename(
        here / "shared" / "weights" / "model.safetensors"
    )
    shutil.copy(DOCS_TESTS / "my_model.py", here)
    _write_programs(directory / "bin")
    texts = {
        "https://example.org/": f"{origin.base_url}/",
        "https://mirror.example.org/": f"{origin.base_url}/",
        "http://127.0.0.1:4001/": f"{origin.base_url}/dragonfly/",
        "0676ba61…": saved.sha256,
        "0676ba61": prefix,
        "0a1b2c3d": prefix,
        "/shared/": f"{here}/shared/",
        "/local/": f"{here}/local/",
    }
    environment = {
        "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SITE_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "TORCH_HOME": str(directory / "torch"),
    }
    return World(texts, here, environment)


def _tar(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def _add_several_files(origin: Origin, weights: Mapping[str, torch.Tensor], sources: Path) -> None:
    parts: dict[str, str] = {}
    for number, names in enumerate((["up.weight", "up.bias"], ["down.weight", "down.bias"]), start=1):
        part = f"model-{number:05}-of-00002.safetensors"
        written = checkpoints.write_safetensors(sources / str(number), {name: weights[name] for name in names}, "part")
        origin.add(f"several/{part}", written.path)
        parts.update(dict.fromkeys(names, part))
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": parts}
    origin.add("several/model.safetensors.index.json", json.dumps(index).encode())


def _write_programs(directory: Path) -> None:
    directory.mkdir()
    for name, words in _PROGRAMS.items():
        path = directory / name
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
