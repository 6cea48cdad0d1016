"""Filesystems on which two names are one file: no origin's bytes are taken for another URL's there."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rankload
from harness import fuse
from harness.origin import Origin

pytestmark = [
    pytest.mark.fault(59),
    pytest.mark.skipif(fuse.why_not() is not None, reason=str(fuse.why_not())),
]

GOOD, EVIL = torch.ones(1 << 16), torch.ones(1 << 16)
EVIL[-1] = 666.0  # as long as the other, and no different in the middle

LONG = "model-" + "x" * 200
ACCENT = "mod\u00e8le-" + "x" * 200

#: The evil origin's name, and the one that it is after.
NAMES = {
    "case": ("MODEL.pth", "model.pth"),
    "case of a long name": (f"{LONG.upper()}.pth", f"{LONG}.pth"),
    "dot": ("model.pth.", "model.pth"),
    "accent": (unicodedata.normalize("NFD", f"{ACCENT}.pth"), unicodedata.normalize("NFC", f"{ACCENT}.pth")),
}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    with fuse.mounted(tmp_path / "backing", tmp_path / "mount", folds_names=True) as mount:
        yield mount.path


@pytest.fixture
def evil() -> Iterator[Origin]:
    with Origin() as server:
        yield server


def checkpoint_of(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save({"w": tensor}, file)
    return file.getvalue()


def load(url: str, cache: Path, name: str) -> torch.Tensor:
    loaded: torch.Tensor = rankload.dist_load_state_dict_from_url(url, cache, file_name=name, progress=False)["w"]
    return loaded


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_two_urls_whose_names_are_one(origin: Origin, evil: Origin, cache: Path, names: tuple[str, str]) -> None:
    theirs, ours = names
    evil_url, url = evil.add("theirs.pth", checkpoint_of(EVIL)), origin.add("ours.pth", checkpoint_of(GOOD))
    for _ in range(2):
        assert torch.equal(load(evil_url, cache, theirs), EVIL)
        assert torch.equal(load(url, cache, ours), GOOD)
