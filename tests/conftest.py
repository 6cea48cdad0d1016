"""Isolates every test from the machine and from the others, and lets no skip pass unseen on CI."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from harness import environments, mounts, spawner
from harness.origin import Origin

if TYPE_CHECKING:
    from harness.checkpoints import CheckpointFile

pytest_plugins = ["harness.fault_report"]

# A deadline for each example, and a limit on making them, would fail tests on a busy machine.
hypothesis.settings.register_profile("rankload", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("rankload")

IS_CI = os.environ.get("CI", "").lower() in {"1", "true"}


def pytest_configure(config: pytest.Config) -> None:
    # At once, not in a fixture: module- and session-scoped fixtures come before any function's.
    for name in list(os.environ):
        if environments.is_stray(name):
            del os.environ[name]
    # torch looks a name up for each connection to a store, and the C library asks a name service for ::ffff:127.0.0.1.
    # An answer that gets lost costs a second with this, and not five (resolv.conf(5)); and no warning of torch's.
    os.environ.update(RES_OPTIONS="timeout:1 attempts:1", TORCH_CPP_LOG_LEVEL="ERROR")
    mounts.isolate()  # before the first process starts, all of which are to see what a test mounts


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's caches, or another test's."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("TORCH_HOME", str(home / ".cache" / "torch"))
    monkeypatch.setenv("RANKLOAD_BACKOFF_SECONDS", "0.02")  # retries are real, the pauses between them short


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """Fails the test that leaves a process running; the process does not outlive it either way."""
    before = spawner.running()  # of fixtures with a wider scope
    yield
    left = spawner.running() - before
    for process in left:
        process.kill()
    assert not left, f"still running after the test: {left}"


@pytest.fixture
def whole_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks tear their interpreter down at exit: for tests after which threads of theirs may still be inside torch."""
    monkeypatch.setattr(spawner, "tears_down", True)


@pytest.fixture
def origin() -> Iterator[Origin]:
    """An HTTP server of the test's own; see ``harness.origin``."""
    with Origin() as server:
        yield server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    """A small checkpoint of torch's zip format, its hash prefix in its name."""
    from harness import checkpoints  # imports torch, which pytest itself does not need

    return checkpoints.write_zip(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    """A checkpoint with other weights."""
    from harness import checkpoints

    return checkpoints.write_zip(tmp_path_factory.mktemp("other"), checkpoints.training_checkpoint())


@pytest.fixture(scope="session")
def big_content() -> bytes:
    """8 MiB that no two downloads confuse: more than the buffers of a loopback connection hold."""
    return b"".join(number.to_bytes(8, "little") for number in range(1 << 20))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not (item.get_closest_marker("gpu") and not _has_accelerator()):
        _fail_if_skipped_on_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped_on_ci(report)  # a whole module: importorskip and the like
    return report


def _fail_if_skipped_on_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    """CI can install what a test needs, so that a skip there hides a missing install step."""
    if IS_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, where all that tests need can be had ({reason})"


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
