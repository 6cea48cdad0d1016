"""Which node fetches which part of a file, and what goes round the ring."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankload._fetch.exchange.plan import ExchangePlan, RingMember, make_plan, unit_bytes_for


def test_each_unit_is_fetched_once_and_everyone_gets_the_rest() -> None:
    plan = make_plan(100, 10, [RingMember(rank) for rank in (0, 2, 5, 7)])
    assert plan is not None
    assert [plan.fetched_by(member) for member in range(4)] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert plan.received_by(0) == [1, 2, 3, 5, 6, 7, 9]
    assert plan.sent_by(3) == plan.received_by(0)
    assert plan.span(9) == (90, 100)


def test_node_that_reaches_no_origin_receives_all() -> None:
    plan = make_plan(25, 10, [RingMember(0), RingMember(1, may_fetch=False)])
    assert plan is not None and plan.owners == (0, 0, 0)
    assert plan.received_by(1) == [0, 1, 2] and plan.sent_by(1) == []
    assert plan.span(2) == (20, 25)


def test_what_a_node_has_is_not_fetched_again() -> None:
    members = [RingMember(0, frozenset({0, 1})), RingMember(1, frozenset({1, 2})), RingMember(2)]
    plan = make_plan(50, 10, members)
    assert plan is not None
    assert [plan.fetched_by(member) for member in range(3)] == [[3], [4], []]
    assert plan.received_by(0) == [2, 4] and plan.received_by(2) == [0, 1, 2, 3, 4]


def test_file_that_a_node_has_is_not_fetched_at_all() -> None:
    plan = make_plan(50, 10, [RingMember(0), RingMember(1, frozenset(range(5)), may_fetch=False)])
    assert plan is not None and not plan.fetched_by(0) and not plan.fetched_by(1)
    assert plan.received_by(0) == [0, 1, 2, 3, 4] and not plan.received_by(1)


def test_nobody_can_bring_a_unit() -> None:
    members = [RingMember(0, frozenset({0}), may_fetch=False), RingMember(1, may_fetch=False)]
    assert make_plan(20, 10, members) is None


@pytest.mark.parametrize(
    ("size", "chunk", "expected"), [(100, 8, 8), (65536 * 8 + 1, 8, 9), (1 << 40, 8 << 20, 16 << 20)]
)
def test_size_of_a_unit(size: int, chunk: int, expected: int) -> None:
    assert unit_bytes_for(size, chunk) == expected


@st.composite
def plans(draw: st.DrawFn) -> ExchangePlan:
    size, unit = draw(st.integers(1, 200)), draw(st.integers(1, 30))
    count = -(-size // unit)
    held = st.frozensets(st.integers(0, count - 1))
    members = [
        RingMember(rank, draw(held), draw(st.booleans()) or rank == 0) for rank in range(draw(st.integers(2, 6)))
    ]
    plan = make_plan(size, unit, members)
    assert plan is not None
    return plan


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_node_gets_every_unit_from_somewhere(plan: ExchangePlan) -> None:
    units = set(range(len(plan.owners)))
    fetched = Counter(unit for member in range(len(plan.members)) for unit in plan.fetched_by(member))
    assert max(fetched.values(), default=1) == 1
    for index, member in enumerate(plan.members):
        assert {*member.held, *plan.fetched_by(index), *plan.received_by(index)} == units
        assert not member.held & {*plan.fetched_by(index), *plan.received_by(index)}
        assert member.may_fetch or not plan.fetched_by(index)
    # every unit that is sent has come to the sender before: round the ring from a node that has or fetches it
    for index in range(len(plan.members)):
        before = (index - 1) % len(plan.members)
        for unit in plan.received_by(index):
            there = {*plan.members[before].held, *plan.fetched_by(before), *plan.received_by(before)}
            assert unit in there
