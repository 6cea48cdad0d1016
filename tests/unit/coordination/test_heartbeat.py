"""How a rank is judged by what it publishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from harness.ranks import wait_until
from rankload._coordination.heartbeat import Heartbeat, PeerMonitor, Status
from rankload._coordination.store import RankStore
from rankload._settings import Settings
from rankload._types import Identity, Progress
from rankload.errors import ProgressTimeoutError, RankFailedError, RankloadError, RankLostError

DOWNLOADING = Status("there", 1, Progress("downloading", 5, 10), beat=1)
SETTINGS = Settings(progress_seconds=2, liveness_seconds=30)


@pytest.fixture
def store() -> RankStore:
    return RankStore(HashStore(), "a store", dies_with_rank_0=False, patience_seconds=5)


def watch_over(store: RankStore, settings: Settings = SETTINGS, *, have_all_come: bool = False) -> PeerMonitor:
    return PeerMonitor(store, "status", 3, settings, lambda rank: have_all_come, lambda rank: (71, "node3"))


def beat(store: RankStore, watch: PeerMonitor, status: Status, seconds: float) -> None:
    """The rank beats once a second, and goes no further."""
    for second in range(1, round(seconds) + 1):
        store.set("status", replace(status, beat=status.beat + second).to_json())
        watch.look(1.0)


@pytest.mark.parametrize(
    ("progress_seconds", "limit_seconds"), [(0.5, 5.5), (2, 7), (120, 150)], ids=["0.5", "2", "120"]
)
def test_a_rank_that_stands_still_has_time_to_tell_of_its_own_deadline(
    store: RankStore, progress_seconds: float, limit_seconds: float
) -> None:
    watch = watch_over(store, replace(SETTINGS, progress_seconds=progress_seconds))
    store.set("status", DOWNLOADING.to_json())
    watch.look(1.0)
    beat(store, watch, DOWNLOADING, int(limit_seconds - 0.1))
    with pytest.raises(ProgressTimeoutError, match=r"rank 3 \(pid 1 on there\).*downloading.*timeout=") as caught:
        beat(store, watch, DOWNLOADING, 1)
    assert (caught.value.stuck_rank, caught.value.stuck_host, caught.value.phase) == (3, "there", "downloading")


@pytest.mark.parametrize(
    "moved",
    [
        Progress("downloading", 6, 10),
        Progress("verifying", 5, 10),
        Progress("downloading", 5, 10, attempt=2),
    ],
    ids=str,
)
def test_every_move_counts(store: RankStore, moved: Progress) -> None:
    watch = watch_over(store)
    store.set("status", DOWNLOADING.to_json())
    watch.look(1.0)
    beat(store, watch, DOWNLOADING, 6)
    beat(store, watch, replace(DOWNLOADING, progress=moved, beat=10), 7)
    with pytest.raises(ProgressTimeoutError):
        beat(store, watch, replace(DOWNLOADING, progress=moved, beat=20), 1)


def test_work_counts_while_loading_alone(store: RankStore) -> None:
    """Page faults and CPU time are no progress of a download: its thread may spin."""
    for phase in ("loading", "downloading"):
        watch = watch_over(store)
        for second in range(7):
            store.set("status", Status("there", 1, Progress(phase), beat=second, effort=second).to_json())
            watch.look(1.0)
        store.set("status", Status("there", 1, Progress(phase), beat=8, effort=8).to_json())
        if phase == "loading":
            watch.look(1.0)
        else:
            with pytest.raises(ProgressTimeoutError):
                watch.look(1.0)


@pytest.mark.parametrize("phase", ["waiting", "backoff", "done"])
def test_declared_waits_take_as_long_as_they_take(store: RankStore, phase: str) -> None:
    waiting = Status("there", 1, Progress(phase), beat=1)  # type: ignore[arg-type]
    beat(store, watch_over(store), waiting, 100)


def test_a_rank_whose_beat_stands_still_is_lost(store: RankStore) -> None:
    watch = watch_over(store, replace(SETTINGS, progress_seconds=1000))
    store.set("status", DOWNLOADING.to_json())
    for _ in range(24):  # four fifths of liveness_seconds after the first look
        watch.look(1.0)
    with pytest.raises(RankLostError, match=r"rank 3 \(pid 1 on there\).*24 s.*downloading") as caught:
        watch.look(1.0)
    assert (caught.value.lost_rank, caught.value.lost_host, caught.value.phase) == (3, "there", "downloading")


@pytest.mark.parametrize("have_all_come", [False, True])
def test_a_rank_that_has_published_nothing_is_absent_or_lost(store: RankStore, have_all_come: bool) -> None:
    watch = watch_over(store, have_all_come=have_all_come)
    for _ in range(23):
        watch.look(1.0)
    assert watch.is_absent is not have_all_come
    if have_all_come:
        with pytest.raises(RankLostError, match=r"rank 3 \(pid 71 on node3\) made the call.*24 s"):
            watch.look(1.0)
    else:
        watch.look(1.0)


@pytest.fixture
def heartbeat(store: RankStore) -> Iterator[Callable[[float, Callable[[], None]], list[RankloadError]]]:
    """Starts a pulse; gives the list of what it notes."""
    with ExitStack() as stopping:

        def start(interval_seconds: float, look_around: Callable[[], None]) -> list[RankloadError]:
            noted: list[RankloadError] = []
            identity = Identity(3, 4, None, None, None, "here", "test")
            beating = Heartbeat(store, "status", identity, interval_seconds, look_around, noted.append)
            stopping.callback(beating.stop)
            beating.start()
            return noted

        yield start


def test_whatever_ends_the_pulse_is_noted(
    heartbeat: Callable[[float, Callable[[], None]], list[RankloadError]],
) -> None:
    def look_around() -> None:
        raise ValueError("no such verdict")

    noted = heartbeat(0.1, look_around)
    wait_until(lambda: noted, 10, "a note")
    assert isinstance(noted[0], RankFailedError) and "ValueError: no such verdict" in str(noted[0])


def test_a_tiny_timeout_does_not_make_the_pulse_race(
    heartbeat: Callable[[float, Callable[[], None]], list[RankloadError]],
) -> None:
    looks: list[float] = []
    heartbeat(1e-6, lambda: looks.append(time.monotonic()))
    wait_until(lambda: len(looks) > 3, 10, "four looks")
    assert looks[3] - looks[0] >= 3 * 0.05
