"""What the tests of launch/ and slurm/ share: how a user sets the templates up, and what a good run looks like."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

TRAIN = ("--capacity", "tiny", "--steps", "2")

# Each rank's node, in a job on 4 nodes with 2 ranks each.
ALL_RANKS = {rank: f"node{rank // 2 + 1}" for rank in range(8)}


def settings(url: str, model_dir: Path) -> dict[str, str]:
    """The variables that configure every template."""
    # One thread a rank: the ranks of all nodes share few cores here, and would fight over them.
    return {"RANKLOAD_URL": url, "RANKLOAD_MODEL_DIR": str(model_dir), "OMP_NUM_THREADS": "1"}


def user_environment() -> dict[str, str]:
    """A shell with the tests' Python active, and nothing of what else surrounds the tests (torchrun, SLURM, ...)."""
    kept = {name: os.environ[name] for name in ("LANG", "PYTHONPATH") if name in os.environ}
    # The nodes' own /tmp as home: a cache that goes astray there does not reach the user's.
    return {**kept, "HOME": "/tmp", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def ranks_in(output: str) -> dict[int, str]:
    """Which ranks reported the end of their training, and from where."""
    return {int(rank): node for rank, node in re.findall(r"^rank (\d+) of \d+ on (\S+) .*loss", output, re.MULTILINE)}


def assert_trained(trained_path: Path, weights_path: Path) -> None:
    """The trained model is the downloaded one, moved a little by two steps of training."""
    trained, original = (torch.load(path, weights_only=True) for path in (trained_path, weights_path))
    assert trained.keys() == original.keys()
    for name in trained:
        if name.endswith((".weight", ".bias")):
            # Two steps move each parameter by less than 1e-4; other initial weights differ by 1e-2 and more.
            distance = (trained[name] - original[name]).abs().max().item()
            assert 0 < distance < 1e-3, f"{name} is {distance} away from the downloaded weights"
