"""Which device a rank uses in a broadcast over the process group, by what it wants and by what the others want."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankload._load.delivery import group_stream
from rankload._load.delivery.group_stream import GroupStream
from rankload._load.delivery.strategy import LoadPlan
from rankload.errors import LoadError


class Counters:
    """The counters of a call."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, key: str, ranks: int = 1) -> int:
        self.counts[key] += ranks
        return self.counts[key]


@pytest.mark.parametrize(
    ("types", "wanted_elsewhere", "own", "expected"),
    [
        (["cuda"], "cuda", "cuda:1", "cuda:1"),
        (["cpu", "cuda"], "cpu", "cuda:1", "cpu"),
        (["cpu"], None, "cuda:1", "cpu"),
        (["cpu", "cuda"], None, "cuda:1", "cuda:1"),
    ],
)
def test_rank_that_wants_nothing_goes_by_the_others(
    monkeypatch: pytest.MonkeyPatch, types: list[str], wanted_elsewhere: str | None, own: str, expected: str
) -> None:
    monkeypatch.setattr(group_stream, "group_for", lambda call, device, why: None)
    monkeypatch.setattr(group_stream, "device_types", lambda group: types)
    counters = Counters()
    call: Any = SimpleNamespace(channel=counters)
    stream = GroupStream(0, call)
    stream.prepare(LoadPlan(None, [], [], lambda: torch.device(own)))
    assert not counters.counts
    if wanted_elsewhere is not None:
        counters.count(f"broadcast/device/{wanted_elsewhere}")
    stream.check_agreement()
    assert stream._device == torch.device(expected)


def test_ranks_that_want_different_kinds_of_device_cannot_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_stream, "group_for", lambda call, device, why: None)
    monkeypatch.setattr(group_stream, "device_types", lambda group: ["cpu", "cuda"])
    counters = Counters()
    counters.counts.update({"broadcast/device/cpu": 1, "broadcast/device/cuda": 2})
    call: Any = SimpleNamespace(channel=counters)
    with pytest.raises(LoadError, match="different kinds of device"):
        GroupStream(0, call).check_agreement()
