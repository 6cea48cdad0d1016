"""What a mirror may not do to another URL's file while nodes exchange it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoints import digest_of
from harness.origin import Origin
from harness.ranks import run_ranks

#: Of a rank that reaches only the mirror.
_MIRROR_ALONE = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost", "RANKLOAD_RETRIES": "0"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CHUNK_BYTES", str(64 << 10))


@pytest.fixture
def mirror() -> Iterator[Origin]:
    with Origin() as mirror:
        yield mirror


def _write(path: Path, seed: int) -> Path:
    """Write a checkpoint whose size does not depend on the seed."""
    path.parent.mkdir()
    torch.save({"w": torch.randn(700, 700, generator=torch.Generator().manual_seed(seed))}, path)
    return path


def _urls(origin: Origin, mirror: Origin, root: Path, etag: str) -> list[str]:
    """Return the URLs of a file, and of a mirror that has another file of the same size."""
    true, false = _write(root / "true" / "big.pth", 1), _write(root / "false" / "big.pth", 2)
    false_url = mirror.add("big.pth", false, etag=etag).replace("127.0.0.1", "localhost")
    return [origin.add("big.pth", true, etag='"1"'), false_url]


def _load(rank: int, urls: Any, root: str) -> str:
    from rankload import RankloadError, dist_load_state_dict_from_url

    try:
        return digest_of(dist_load_state_dict_from_url(urls, f"{root}/node{rank}"))
    except RankloadError as error:
        return str(error)


def _recorded_url(node: Path) -> str:
    return str(json.loads((node / ".rankload" / "big.pth.json").read_text())["url"])


def test_mirror_with_the_etag_of_another_url_does_not_mix_its_bytes_in(
    origin: Origin, mirror: Origin, tmp_path: Path
) -> None:
    urls = _urls(origin, mirror, tmp_path, etag='"1"')
    run_ranks(_load, 2, nodes=2, args=(urls, str(tmp_path)), rank_env={1: _MIRROR_ALONE})
    for node, folder in enumerate(["true", "false"]):
        found = tmp_path / f"node{node}" / "big.pth"
        assert found.read_bytes() == (tmp_path / folder / "big.pth").read_bytes(), node
        assert _recorded_url(found.parent) == urls[node]


@pytest.mark.parametrize("has_it", [0, 1])
def test_mirrors_file_from_another_node_stays_the_mirrors(
    origin: Origin, mirror: Origin, tmp_path: Path, has_it: int
) -> None:
    urls = _urls(origin, mirror, tmp_path, etag='"2"')
    alone = tmp_path / "alone" / "node0"
    run_ranks(_load, 1, env="none", args=(urls, str(alone.parent)), rank_env={0: _MIRROR_ALONE})
    shutil.move(alone, tmp_path / f"node{has_it}")
    env = {0: {**_MIRROR_ALONE, "no_proxy": ""}} if has_it else {}  # the first node reaches neither
    run_ranks(_load, 2, nodes=2, args=(urls, str(tmp_path)), rank_env=env)
    assert [_recorded_url(tmp_path / f"node{node}") for node in range(2)] == [urls[1]] * 2

    shutil.move(tmp_path / f"node{1 - has_it}", alone)
    [result] = run_ranks(_load, 1, env="none", args=(urls[0], str(alone.parent)))
    assert result.value == digest_of(torch.load(tmp_path / "true" / "big.pth"))
