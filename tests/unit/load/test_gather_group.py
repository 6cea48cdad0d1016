"""Ranks in a grid of process groups: their numbers, and the blocks that they exchange, all in one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rankload._load.sharing import gather_group
from rankload._load.sharing.gather_group import GatherGroup


@dataclass(frozen=True)
class Line:
    """A process group: the ranks of a grid that differ from one another in one coordinate only."""

    size: int
    rank: int
    others: tuple[int | None, ...]


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (3, 2), (2, 3, 2)])
def test_every_rank_gets_every_share_in_its_place(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    monkeypatch.setattr(gather_group.dist, "get_world_size", lambda line: line.size)
    monkeypatch.setattr(gather_group.dist, "get_rank", lambda line: line.rank)
    called: list[tuple[Line, torch.Tensor, torch.Tensor]] = []

    def note(whole: torch.Tensor, own: torch.Tensor, group: Line, async_op: bool) -> None:
        called.append((group, whole, own))

    monkeypatch.setattr(gather_group, "_all_gather", note)
    groups = []
    for place in itertools.product(*map(range, sizes)):
        lines: Any = tuple(
            Line(size, place[at], tuple(None if at == other else index for other, index in enumerate(place)))
            for at, size in enumerate(sizes)
        )
        groups.append(GatherGroup(lines))
    numbers, count, share = [group.number for group in groups], groups[0].count, 5
    assert sorted(numbers) == list(range(count)) and numbers[0] == 0
    contents = [torch.full((count * share,), 255, dtype=torch.uint8) for _ in groups]
    for number, content in zip(numbers, contents, strict=True):
        content.narrow(0, number * share, share).fill_(number)
    for dimension in range(len(sizes)):
        called.clear()
        for group, content in zip(groups, contents, strict=True):
            group._start(content, dimension)
        blocks = {(line.others, line.rank): own.clone() for line, _, own in called}
        for line, whole, _ in called:
            whole.copy_(torch.cat([blocks[line.others, rank] for rank in range(line.size)]))
    expected = torch.arange(count, dtype=torch.uint8).repeat_interleave(share)
    assert all(torch.equal(content, expected) for content in contents)
