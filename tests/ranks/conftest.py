"""What the tests of real ranks share: a small checkpoint, and deadlines short enough to see them pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness import checkpoints
from harness.checkpoints import CheckpointFile


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    """A small zip checkpoint."""
    return checkpoints.write_zip(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    """Another one, with other content."""
    return checkpoints.write_zip(tmp_path_factory.mktemp("checkpoints"), checkpoints.training_checkpoint(), "other")


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    """A cold cache directory."""
    return str(tmp_path / "cache")


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> float:
    """Makes ranks notice a death within the seconds returned, and write a line a second while they wait."""
    liveness_seconds = 4.0
    settings = {"LIVENESS": liveness_seconds, "HEARTBEAT": 0.2, "REPORT": 1.0, "LEASE": 3.0}
    for name, seconds in settings.items():
        monkeypatch.setitem(os.environ, f"RANKLOAD_{name}_SECONDS", str(seconds))
    return liveness_seconds
