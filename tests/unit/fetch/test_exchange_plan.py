"""Which node fetches which part of a file, and what the nodes agree on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankload._fetch.exchange.catch_up import CatchUp
from rankload._fetch.exchange.offers import Agreed, Offer, agreement_on
from rankload._fetch.exchange.plan import ExchangePlan, count_units, make_plan, unit_bytes_for, units_within
from rankload._fetch.origins.origin import Claim, Version

VERSION = Version(100, '"1"')
FETCHES = Offer(may_fetch=True, may_split=True, version=VERSION)
RECEIVES = Offer()
HAS_FILE = Offer(has_file=True, version=replace(VERSION, claim=Claim("ab", "its record")), spans=((0, 100),))
ALONE = Offer(is_alone=True)


def agree(*offers: Offer) -> Agreed:
    agreed = agreement_on(dict(enumerate(offers)), b"secret", 10)
    assert Agreed.from_json(json.loads(json.dumps(agreed.as_json()))) == agreed
    for offer in offers:
        assert Offer.from_json(json.loads(json.dumps(offer.as_json()))) == offer
    return agreed


def plan_of(*offers: Offer) -> ExchangePlan:
    exchange = agree(*offers).exchange
    assert exchange is not None
    return exchange.plan


def test_each_unit_is_fetched_once_in_turns() -> None:
    plan = plan_of(FETCHES, FETCHES, FETCHES, FETCHES)
    assert [plan.fetched_by(member) for member in range(4)] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert plan.span(9) == (90, 100) and plan.ranks == (0, 1, 2, 3)


def test_turn_is_a_run_of_units_as_long_as_a_request_but_not_longer_than_leaves_turns_to_all() -> None:
    plan = make_plan(320, 10, 40, (0, 1), (0, 1), range(32))
    assert plan is not None
    assert plan.fetched_by(1) == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31]
    short = make_plan(80, 10, 40, (0, 1), (0, 1), range(8))
    assert short is not None and short.fetched_by(0) == [0, 2, 4, 6]


def test_node_that_reaches_no_origin_receives_all() -> None:
    plan = plan_of(FETCHES, RECEIVES)
    assert plan.fetched_by(0) == list(range(10)) and plan.fetched_by(1) == []


def test_what_a_node_has_is_not_fetched_again() -> None:
    first, second = replace(FETCHES, spans=((0, 25),)), replace(FETCHES, spans=((10, 30), (95, 100)))
    agreed = agree(first, second, FETCHES)
    assert agreed.exchange is not None
    assert [agreed.exchange.held(offer) for offer in (first, second, FETCHES)] == [{0, 1}, {1, 2}, set()]
    assert sorted(unit for member in range(3) for unit in agreed.exchange.plan.fetched_by(member)) == list(range(3, 10))


def test_bytes_of_another_version_do_not_count() -> None:
    older = Offer(version=replace(VERSION, etag='"0"'), spans=((0, 100),))
    agreed = agree(FETCHES, older)
    assert agreed.exchange is not None and not agreed.exchange.held(older)
    assert agreed.exchange.plan.missing == ((0, 10),)


def test_file_that_a_node_has_is_not_fetched_and_its_digest_counts_for_all() -> None:
    agreed = agree(FETCHES, HAS_FILE, RECEIVES)
    assert agreed.exchange is not None
    assert agreed.exchange.plan.missing == () and agreed.exchange.version.claim == Claim("ab", "its record")


@pytest.mark.parametrize(
    "offers",
    [
        (ALONE, FETCHES, FETCHES),
        (FETCHES, ALONE),
        (RECEIVES, RECEIVES),
        (HAS_FILE, HAS_FILE),
        (replace(RECEIVES, version=VERSION, spans=((0, 50),)), RECEIVES),
    ],
)
def test_nothing_to_exchange(offers: tuple[Offer, ...]) -> None:
    assert agree(*offers) == Agreed()


def test_origin_that_cannot_be_split_is_asked_by_one_node() -> None:
    whole = Offer(may_fetch=True, version=Version(100))
    assert agree(RECEIVES, whole, whole) == Agreed(fetcher=1)
    assert agree(whole, replace(whole, version=Version(None))) == Agreed(fetcher=0)
    assert plan_of(HAS_FILE, RECEIVES).missing == ()  # the next round


def test_all_nodes_receive_the_version_that_the_first_one_has() -> None:
    newer = replace(FETCHES, version=Version(100, '"2"'), spans=((0, 50),))
    agreed = agree(HAS_FILE, newer, RECEIVES)
    assert agreed.exchange is not None and agreed.exchange.plan.missing == () and not agreed.exchange.held(newer)
    assert agreed.exchange.version_for(newer) is None
    assert agree(HAS_FILE, replace(HAS_FILE, version=Version(100, '"2"')), RECEIVES).exchange is not None


def test_what_is_left_of_a_download_does_not_say_which_version_there_is() -> None:
    older = Offer(version=replace(VERSION, etag='"0"'), spans=((0, 50),))
    agreed = agree(older, FETCHES, FETCHES)
    assert agreed.exchange is not None and agreed.exchange.version.etag == VERSION.etag


def test_one_node_fetches_for_all_when_nobody_has_reached_the_origin_or_the_first_one_waits() -> None:
    may_try = Offer(may_try=True)
    assert agree(RECEIVES, may_try, may_try) == Agreed(fetcher=1)
    waits = Offer(is_alone=True, comes_later=True)
    assert agree(waits, FETCHES, RECEIVES) == Agreed(fetcher=0)
    assert agree(waits, HAS_FILE) == Agreed()


@pytest.mark.parametrize(
    ("size", "chunk", "expected"),
    [(100, 8, 8), (65536 * 8 + 1, 8, 9), (1 << 40, 8 << 20, 16 << 20), (1 << 30, 8 << 20, 1 << 20)],
)
def test_size_of_a_unit(size: int, chunk: int, expected: int) -> None:
    assert unit_bytes_for(size, chunk) == expected


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 10), (10, 20)], {0, 1}),
        ([(1, 25)], {1, 2}),
        ([(20, 25)], {2}),
        ([(15, 19)], set()),
        ([(0, 9), (9, 10)], {0}),
    ],
)
def test_units_that_lie_within_ranges(spans: list[tuple[int, int]], expected: set[int]) -> None:
    assert units_within(spans, 25, 10) == expected


@st.composite
def plans(draw: st.DrawFn) -> tuple[ExchangePlan, list[int]]:
    size, unit = draw(st.integers(1, 200)), draw(st.integers(1, 30))
    missing = sorted(draw(st.sets(st.integers(0, count_units(size, unit) - 1))))
    ranks = range(draw(st.integers(2, 6)))
    fetchers = sorted(draw(st.sets(st.sampled_from(ranks), min_size=1)))
    plan = make_plan(size, unit, draw(st.integers(1, 200)), ranks, fetchers, missing)
    assert plan is not None
    return plan, missing


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_missing_unit_is_fetched_by_one_node(plan_and_missing: tuple[ExchangePlan, list[int]]) -> None:
    plan, missing = plan_and_missing
    fetched = [plan.fetched_by(member) for member in range(len(plan.ranks))]
    assert Counter(unit for units in fetched for unit in units) == Counter(missing)
    for member, units in enumerate(fetched):
        assert units == sorted(units)
        assert member in plan.fetchers or not units


def test_plan_for_a_file_in_many_pieces_is_small_and_complete() -> None:
    missing = [unit for unit in range(60_000) if unit % 10]
    plan = make_plan(60_000, 1, 1, (0, 1), (0, 1), missing)
    assert plan is not None and len(json.dumps(vars(plan))) < 64 << 10
    assert {*plan.fetched_by(0), *plan.fetched_by(1)} >= set(missing)


def extra(ring: float, *, part: int = 100, seconds: float = 20) -> tuple[int, float]:
    """Return what a node fetches beyond its part of 1000 bytes, and when it has all; the origin sends 100 bytes/s."""
    catch_up, wanted, come, now = CatchUp(0.0, 1000, 10), float(part), 0.0, 0.0
    while come + ring * now < 1000 and now < seconds:
        now += 0.1
        come = min(come + 10, wanted)
        wanted += catch_up.bytes_to_fetch(
            now, origin_bytes=round(come), ring_bytes=round(ring * now), left_bytes=round(wanted - come)
        )
    return round(wanted - part), now


def test_node_fetches_more_only_if_it_would_have_the_file_earlier_without_the_others() -> None:
    assert extra(300) == (0, pytest.approx(3, abs=0.2))
    assert extra(120)[0] == 0
    fetched, seconds = extra(50)  # the ring alone would take 18 s, the origin alone 10 s
    assert 300 < fetched < 900 and seconds < 9
    fetched, seconds = extra(0)
    assert fetched >= 900 and seconds < 10.5
    assert extra(0, part=0)[0] == 0  # a node that fetches nothing does not know how fast the origin is


@pytest.mark.parametrize("first", [0.01, 1.3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_units_that_come_at_long_intervals_are_not_late(first: float, count: int) -> None:
    """A node fetches some units of 65 bytes, one in 1.3 s, the three others one more; some origins send one at once."""
    catch_up, now, come = CatchUp(0.0, (4 * count + 3) * 65, 65), 0.0, 0
    while come <= count:
        now += 0.1
        come = int((now - first) / 1.3) + 1 if now >= first else 0
        own = min(come, count)
        wanted = catch_up.bytes_to_fetch(
            now, origin_bytes=own * 65, ring_bytes=3 * come * 65, left_bytes=(count - own) * 65
        )
        assert wanted == 0, now
