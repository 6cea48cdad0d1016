"""What a failed job prints: the failure once, in full, on the rank where it happened, and a few lines on the others."""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankload
from harness.checkpoints import CheckpointFile
from harness.origin import Origin
from harness.ranks import run_ranks

pytestmark = pytest.mark.fault(84)

_ELSEWHERE = "; its traceback is there]"
_FRAMES_OF_THE_HARNESS = re.compile(r'  File "[^"]*/harness/[^"]*".*\n(?:    .*\n)*')


def _load(rank: int, url: str, model_dir: str, failing: str) -> None:
    if failing == "misfit":
        rankload.dist_load_into(nn.Sequential(nn.Linear(3, 4)), url, model_dir)
    elif failing == "digest":
        rankload.dist_load_state_dict_from_url(url, model_dir, sha256="0" * 64)
    elif failing == "adapt":
        rankload.dist_load_state_dict_from_url(url, model_dir, adapt=_users_own)
    elif failing == "timeout":
        rankload.dist_load_state_dict_from_url(url, model_dir, timeout=0.5)
    else:
        rankload.dist_load_state_dict_from_url(url, model_dir)


def _users_own(content: dict[str, Any]) -> Any:
    return content["no such key"]


def _tracebacks(failing: str, url: str, cache_dir: str) -> list[str]:
    results = run_ranks(_load, 4, args=(url, cache_dir, failing))
    errors = [result.exception for result in results]
    return [_FRAMES_OF_THE_HARNESS.sub("", error.traceback) for error in errors if error is not None]


@pytest.mark.parametrize(
    ("failing", "name"),
    [
        ("404", "HTTPStatusError"),
        ("digest", "DigestMismatchError"),
        ("refused", "UnsafePickleError"),
        ("misfit", "LoadError"),
        ("timeout", "FetchTimeoutError"),
        ("adapt", "RankFailedError"),
    ],
)
def test_a_failure_of_all_ranks_is_printed_once_and_told_in_a_few_lines(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str, failing: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKLOAD_RETRIES", "0")
    url = {
        "404": lambda: origin.url("nothing.pth"),
        "refused": lambda: origin.add("refused.pth", _saved({"arguments": argparse.Namespace(x=1)})),
        "timeout": lambda: origin.add(checkpoint.name, checkpoint.path, hold_at=0),
    }.get(failing, lambda: origin.add(checkpoint.name, checkpoint.path))()
    shown = _tracebacks(failing, url, cache_dir)
    others = [text for text in shown if _ELSEWHERE in text]
    assert (len(shown), len(others)) == (4, 3), shown
    assert sum(len(text.splitlines()) for text in shown) <= 40, "\n".join(shown)
    kind = getattr(rankload.errors, name)
    for text in shown:
        assert f"\n{kind.__module__}.{name}: " in text
        points_to_docs = f"docs/reference/errors.md#{name.lower()}" in text
        assert points_to_docs is (text not in others and sys.version_info >= (3, 11))
        assert "in _load\n" in text
    for text in others:
        assert text.count("Traceback") == 1  # no chain: what this rank found by itself is the same
        assert re.findall(r"/rankload/((?:\w+/)*\w+\.py)", text) == ["_api/tracebacks.py"]
        assert len([line for line in text.splitlines() if not line.startswith(" ")]) == 2  # the header, the error


def test_the_users_own_frames_remain_on_the_rank_where_they_failed(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    shown = _tracebacks("adapt", origin.add(checkpoint.name, checkpoint.path), cache_dir)
    [text] = [text for text in shown if _ELSEWHERE not in text]
    assert "in _users_own\n" in text and "\nKeyError: 'no such key'\n" in text


def test_several_lines_of_another_rank_are_one_here_and_all_in_the_message(
    origin: Origin, checkpoint: CheckpointFile, cache_dir: str
) -> None:
    results = run_ranks(_describe_misfit, 2, args=(origin.add(checkpoint.name, checkpoint.path), cache_dir))
    (full, message), (short, message_of_another) = sorted((result.value for result in results), key=_is_short)
    assert full.startswith(message) and message == message_of_another
    assert len(message.splitlines()) > 2 and "0.weight" in message
    assert len(short.splitlines()) == 1 and "does not fit the Sequential: " in short and "0.weight" in short


def _is_short(value: tuple[str, str]) -> bool:
    return _ELSEWHERE in value[0]


def _describe_misfit(rank: int, url: str, model_dir: str) -> tuple[str, str]:
    with pytest.raises(rankload.LoadError) as caught:
        _load(rank, url, model_dir, "misfit")
    return str(caught.value), caught.value.message


def test_a_different_failure_of_this_rank_is_kept(origin: Origin, checkpoint: CheckpointFile, cache_dir: str) -> None:
    results = run_ranks(_fail_in_own_way, 2, args=(origin.add(checkpoint.name, checkpoint.path), cache_dir))
    errors = [result.exception for result in results]
    [text] = [error.traceback for error in errors if error is not None and _ELSEWHERE in error.traceback]
    assert "KeyError: 'wanted by rank 0'" in text and "KeyError: 'wanted by rank 1'" in text


def _fail_in_own_way(rank: int, url: str, model_dir: str) -> None:
    rankload.dist_load_state_dict_from_url(url, model_dir, adapt=lambda content: content[f"wanted by rank {rank}"])


@pytest.mark.parametrize("call", [rankload.load, rankload.open_checkpoint, rankload.hub.load_state_dict_from_url])
def test_one_process_shows_where_it_happened(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(rankload.RankloadError) as caught:
        call(f"file://{path}")
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("Traceback") == 1
    assert len(re.findall(r"/rankload/(?:\w+/)*\w+\.py", text)) == 2  # the call, and where it happened


def test_the_full_traceback_is_logged_at_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.pth").write_bytes(_saved({"arguments": argparse.Namespace(x=1)}))
    with caplog.at_level(logging.DEBUG, logger="rankload"), pytest.raises(rankload.errors.UnsafePickleError):
        rankload.load(tmp_path / "model.pth")
    assert (
        "_load/state_dict/read_checkpoint.py" in caplog.text
        and "UnpicklingError: Weights only load failed" in caplog.text
    )


def _saved(content: Any) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()
