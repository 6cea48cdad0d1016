"""When a silent holder's marker is removed, and when not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankload._cache import silent_lease
from rankload._cache.silent_lease import MARGIN_SECONDS, SilentMarker

LEASE_SECONDS = 3.0


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.lease"
    path.write_text("token=1")
    return path


def look_for(marker: SilentMarker, clock: Clock, seconds: float) -> list[bool]:
    looks = []
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        looks.append(marker.is_in_the_way())
    return looks


def test_silent_marker_is_removed_after_the_lease_and_not_before(path: Path, clock: Clock) -> None:
    marker = SilentMarker(path, LEASE_SECONDS, clock)
    assert not any(look_for(marker, clock, LEASE_SECONDS + MARGIN_SECONDS))
    assert path.exists()
    assert not any(look_for(marker, clock, 1.0))
    assert list(path.parent.iterdir()) == []


def test_heartbeat_and_a_new_holder_begin_anew(path: Path, clock: Clock) -> None:
    marker = SilentMarker(path, LEASE_SECONDS, clock)
    for beat in range(5):
        look_for(marker, clock, LEASE_SECONDS)
        os.utime(path, ns=(0, beat))
    path.unlink()
    look_for(marker, clock, LEASE_SECONDS)
    path.write_text("token=2")
    look_for(marker, clock, LEASE_SECONDS)
    assert path.read_text() == "token=2"


def test_stopped_process_counts_nothing_of_the_time_it_was_away(path: Path, clock: Clock) -> None:
    marker = SilentMarker(path, LEASE_SECONDS, clock)
    marker.is_in_the_way()
    clock.now += 3600
    assert not marker.is_in_the_way() and path.exists()


def test_marker_that_cannot_be_removed_is_in_the_way(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "rename", refuse)
    assert any(look_for(SilentMarker(path, LEASE_SECONDS, clock), clock, LEASE_SECONDS + MARGIN_SECONDS + 1))
    assert path.exists()


def test_marker_of_one_who_was_quicker_is_put_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the rename another waiter has removed the dead one's, and holds the lease now."""
    mark = silent_lease._mark_of(path)
    assert mark is not None
    rename = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        path.unlink()
        path.write_text("token=2")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert silent_lease._remove(path, mark)
    assert path.read_text() == "token=2" and list(path.parent.iterdir()) == [path]


def test_link_and_pipe_are_let_be(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "nothing"):
        marker = SilentMarker(tmp_path / name, LEASE_SECONDS, clock)
        assert not any(look_for(marker, clock, 20.0))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").exists()
    assert (tmp_path / "elsewhere").read_text() == "precious"
