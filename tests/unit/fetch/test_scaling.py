"""How many streams: over links that are simulated, in their own time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rankload._fetch.transfer.scaling import StreamScaler

TICK = 0.1
MB = 1_000_000

Link = Callable[[float, int], float]  # (time, streams) → bytes/s of all together


def capped(per_stream: float, all_together: float) -> Link:
    return lambda now, streams: min(per_stream * streams, all_together)


def simulate(
    link: Link,
    seconds: float,
    limit: int = 16,
    scaler: StreamScaler | None = None,
    begin: float = 0.0,
    hash_rate: float = float("inf"),
) -> list[int]:
    """The target after every tick. Streams come at once, and leave half a second after they are not wanted."""
    scaler = scaler or StreamScaler(limit)
    now, done, active, surplus_since = begin, 0.0, 0, None
    targets = []
    while now < begin + seconds:
        scaler.observe(now, int(done), active, hash_rate)
        targets.append(scaler.target)
        if active > scaler.target:
            surplus_since = surplus_since if surplus_since is not None else now
            if now - surplus_since >= 0.5:
                active, surplus_since = scaler.target, None
        else:
            active, surplus_since = scaler.target, None
        now += TICK
        done += link(now, active) * TICK
    assert all(1 <= target <= limit for target in targets)
    return targets


def test_one_stream_that_fills_the_pipe_stays_nearly_alone():
    """It is put to the test again now and then, and each time found enough."""
    targets = simulate(capped(100 * MB, 100 * MB), 120)
    assert targets.count(1) / len(targets) > 0.85
    assert targets[-1] == 1 or targets[-20] == 1
    assert max(targets) == 4


def test_hash_that_could_not_keep_up_with_twice_the_bytes_keeps_it_at_one():
    assert set(simulate(capped(900 * MB, 4000 * MB), 60, hash_rate=1600 * MB)) == {1}


def test_hash_that_has_time_left_does_not_keep_it_from_climbing():
    targets = simulate(capped(100 * MB, 800 * MB), 60, hash_rate=1600 * MB)
    assert targets[-1] == 8  # not 16: what 8 bring keeps half of the hash's time


def test_connections_that_are_slow_one_by_one_lead_to_sixteen_soon():
    targets = simulate(capped(20 * MB, 400 * MB), 60)
    assert targets.index(16) * TICK <= 3
    assert set(targets[targets.index(16) :]) == {16}


@pytest.mark.parametrize("all_together", [80 * MB, 160 * MB])
def test_no_more_than_help(all_together):
    """Of 4, 8 and 16 that bring the same, the fewest."""
    enough = all_together // (20 * MB)
    targets = simulate(capped(20 * MB, all_together), 120)
    assert targets.count(enough) / len(targets) > 0.8
    assert max(targets) <= 2 * enough


def test_a_burst_at_the_beginning_misleads_for_a_short_time_only():
    """A cloud's disk or network gives more for the first seconds."""
    targets = simulate(lambda now, streams: 200 * MB if now < 0.4 else min(10 * MB * streams, 160 * MB), 60)
    assert targets.index(16) * TICK <= 25
    assert set(targets[-100:]) == {16}


def test_a_link_that_becomes_narrow_does_not_break_it():
    targets = simulate(lambda now, streams: min(20 * MB * streams, 400 * MB if now < 10 else 20 * MB), 100)
    assert 16 in targets[:100]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 8, 12, 16, 40])
@pytest.mark.parametrize("seed", range(3))
def test_never_more_than_the_limit_and_never_none(limit, seed):
    source = random.Random(seed)
    simulate(lambda now, streams: source.choice([0, 1, 10, 100]) * MB * source.random(), 100, limit)


@pytest.mark.parametrize("limit", [1, 2, 5, 12, 40])
def test_the_limit_is_reached_where_it_helps(limit):
    assert simulate(capped(MB, 1000 * MB), 30, limit)[-1] == limit


@pytest.mark.parametrize("seed", range(10))
def test_noise_of_a_tenth_neither_hides_the_gain_nor_feigns_one(seed):
    source = random.Random(seed)

    def noisy(link: Link) -> Link:
        return lambda now, streams: link(now, streams) * source.uniform(0.9, 1.1)

    assert simulate(noisy(capped(20 * MB, 400 * MB)), 30)[-1] == 16
    targets = simulate(noisy(capped(100 * MB, 100 * MB)), 120)
    assert targets.count(1) / len(targets) > 0.7


def test_nothing_is_measured_before_the_first_byte_or_while_streams_come_and_go():
    scaler = StreamScaler(16)
    for tick in range(100):
        scaler.observe(tick * TICK, 0, 1)
    assert scaler.target == 1
    for tick in range(100, 200):
        scaler.observe(tick * TICK, tick * MB, 2)  # one is still on its way out
    assert scaler.target == 1


def test_a_standstill_is_no_measurement():
    scaler = StreamScaler(16)
    simulate(capped(20 * MB, 400 * MB), 10, scaler=scaler)
    for tick in range(1000):
        scaler.observe(100 + tick * TICK, 50_000 * MB, 16)
    assert scaler.target == 16


def test_an_origin_that_turns_streams_away_gets_fewer_for_a_while():
    scaler = StreamScaler(16)
    simulate(capped(20 * MB, 400 * MB), 10, scaler=scaler)
    assert scaler.target == 16
    scaler.back_off(10, 6)  # six were at work when the last one was refused
    assert scaler.target == 5
    assert set(simulate(capped(20 * MB, 400 * MB), 19, scaler=scaler, begin=10)) == {5}
    assert 8 in simulate(capped(20 * MB, 400 * MB), 5, scaler=scaler, begin=29)


def test_it_backs_off_down_to_one():
    scaler = StreamScaler(16)
    for now in range(5):
        scaler.back_off(now, 1)
        assert scaler.target == 1
