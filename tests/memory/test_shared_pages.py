"""Four ranks of one host hold one copy of a checkpoint; torch.hub's way holds four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankload
from harness.checkpoints import CheckpointFile, write_big
from harness.origin import Origin
from harness.rank import mark_and_wait
from harness.ranks import start_ranks

CHECKPOINT_BYTES = 1_000_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFile:
    return write_big(tmp_path_factory.mktemp("big"), CHECKPOINT_BYTES)


@pytest.mark.slow
def test_a_warm_call_of_four_ranks_asks_nobody_and_holds_one_copy(
    checkpoint: CheckpointFile, origin: Origin, tmp_path: Path
) -> None:
    url = _serve_from_a_warm_cache(checkpoint, origin, tmp_path)
    requests_before = origin.request_count()
    bytes_held = _bytes_held_after_touching_every_page(_load_with_rankload, url, tmp_path)
    assert origin.request_count() == requests_before
    assert bytes_held <= 1.2 * checkpoint.path.stat().st_size


def test_four_ranks_hold_one_copy_of_a_local_file(checkpoint: CheckpointFile, origin: Origin, tmp_path: Path) -> None:
    """It is not mapped, since it may be rewritten: the ranks share memory that it was copied to."""
    url = _serve_from_a_warm_cache(checkpoint, origin, tmp_path)
    local = str(tmp_path / checkpoint.path.name)
    bytes_held = _bytes_held_after_touching_every_page(_load_with_rankload, url, tmp_path, local)
    assert bytes_held <= 1.1 * checkpoint.path.stat().st_size


@pytest.mark.slow
def test_torch_hub_in_every_rank_holds_four_copies(checkpoint: CheckpointFile, origin: Origin, tmp_path: Path) -> None:
    """The measure can tell the difference."""
    url = _serve_from_a_warm_cache(checkpoint, origin, tmp_path)
    assert _bytes_held_after_touching_every_page(_load_with_torch_hub, url, tmp_path) > 3.8 * CHECKPOINT_BYTES


def _serve_from_a_warm_cache(checkpoint: CheckpointFile, origin: Origin, model_dir: Path) -> str:
    url = origin.add(checkpoint.path.name, checkpoint.path)
    rankload.dist_fetch(url, model_dir)
    return url


def _bytes_held_after_touching_every_page(load: Any, url: str, model_dir: Path, location: str = "") -> int:
    with start_ranks(load, 4, args=(location or url, str(model_dir))) as group:
        group.wait_for_mark("imported")
        before = sum(group.pss_bytes())
        group.open_gate("imported")
        group.wait_for_mark("touched", timeout_seconds=120)
        held = sum(group.pss_bytes()) - before
        group.open_gate("touched")
        for result in group.wait():
            assert result.value == pytest.approx(_checksum_of_file(url, model_dir))
    return held


def _checksum_of_file(url: str, model_dir: Path) -> float:
    state_dict = torch.load(model_dir / url.rpartition("/")[2], mmap=True)
    return _touch_every_page(state_dict)


def _touch_every_page(state_dict: dict[str, torch.Tensor]) -> float:
    # eight bytes of each page
    samples = [tensor.view(torch.uint8).view(-1)[::512] for tensor in state_dict.values()]
    return sum(float(sample.sum(dtype=torch.float64)) for sample in samples)


def _load_with_rankload(rank: int, url: str, model_dir: str) -> float:
    import rankload._api.state_dict
    import rankload._load.state_dict.read_checkpoint

    mark_and_wait("imported")
    state_dict = rankload.dist_load_state_dict_from_url(url, model_dir)
    checksum = _touch_every_page(state_dict)
    mark_and_wait("touched")
    return checksum


def _load_with_torch_hub(rank: int, url: str, model_dir: str) -> float:
    mark_and_wait("imported")
    state_dict = torch.hub.load_state_dict_from_url(url, model_dir, weights_only=True)
    checksum = _touch_every_page(state_dict)
    mark_and_wait("touched")
    return checksum
