"""Checkpoints that all tests of the fetch share."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import checkpoints
from harness.checkpoints import CheckpointFile


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    """A small checkpoint of torch's zip format, its hash prefix in its name."""
    return checkpoints.write_zip(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    """A checkpoint with other weights."""
    return checkpoints.write_zip(tmp_path_factory.mktemp("other"), checkpoints.training_checkpoint())


@pytest.fixture(scope="session")
def big_content() -> bytes:
    """8 MiB that no two downloads confuse: more than the buffers of a loopback connection hold."""
    return b"".join(number.to_bytes(8, "little") for number in range(1 << 20))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
