"""Texts from files, names above all, in errors, logs and representations: escaped, and on no line of their own."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_files import changed, content, records_of, write_records
from torch import nn

import rankload

#: Would begin a line of a log, clear the screen, go back in the line, and turn the rest of it round.
FORGED = "2026-11-29 INFO all ranks are well"
HOSTILE = f"a\n{FORGED}\x1b[2J\r\x9b\u202e\u2066\u200b\x00"


def save(path: Path, saved: Any) -> Path:
    torch.save(saved, path)
    return path


def safetensors(path: Path, header: Any) -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    return path


def entry(dtype: str = "F32", end: int = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [4], "data_offsets": [0, end]}


def with_global(path: Path, name: bytes) -> Path:
    """A checkpoint whose storage is of another class: two lines that may hold anything but a line break."""
    records = records_of(content())
    records["data.pkl"] = changed(records["data.pkl"], b"ctorch\nFloatStorage\n", b"ctorch\n" + name + b"\n")
    return write_records(path, records)


def with_stack_global(path: Path, name: bytes) -> Path:
    """The same by texts on the stack, as pickle protocol 4 has it: with line breaks."""
    texts = b"".join(b"X" + len(text).to_bytes(4, "little") + text for text in (b"torch", name))
    records = records_of(content())
    records["data.pkl"] = changed(records["data.pkl"], b"ctorch\nFloatStorage\n", texts + b"\x93")
    return write_records(path, records)


def into_module(path: Path) -> None:
    rankload.dist_load_into(nn.Linear(1, 1), path, progress=False)


def into_optimizer(path: Path) -> None:
    module = nn.Linear(1, 1)
    rankload.dist_load_into((module, torch.optim.Adam(module.parameters())), path, progress=False)


def index_that_is_wrong(path: Path) -> Path:
    save(path.with_name("part.pth"), {"b": torch.zeros(1)})
    path.write_text(json.dumps({"weight_map": {HOSTILE: "part.pth"}}))
    return path


RAW = HOSTILE.encode()
ONE_LINE = RAW.replace(b"\n", b"")

FAILURES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "unexpected name": (lambda path: save(path, {HOSTILE: torch.zeros(1)}), into_module),
    "nested name": (lambda path: save(path, {"x": {HOSTILE: torch.zeros(1)}}), into_module),
    "wrapper": (lambda path: save(path, {HOSTILE: {"weight": torch.zeros(1)}}), into_module),
    "unwrap": (
        lambda path: save(path, {HOSTILE: 1}),
        lambda path: rankload.dist_load_state_dict_from_url(path, adapt=rankload.adapt.unwrap("model")),
    ),
    "optimizer": (
        lambda path: save(
            path,
            {
                "model": nn.Linear(1, 1).state_dict(),
                "optimizer": {"state": {}, "param_groups": [{"params": [HOSTILE]}]},
            },
        ),
        into_optimizer,
    ),
    "no optimizer": (lambda path: save(path, {HOSTILE: 1, "model": nn.Linear(1, 1).state_dict()}), into_optimizer),
    "class": (lambda path: with_global(path, ONE_LINE), rankload.load),
    "class of a mapped file": (lambda path: with_global(path, ONE_LINE), lambda path: rankload.load(path, mmap=True)),
    "class in an index": (lambda path: with_global(path, ONE_LINE), rankload.open_checkpoint),
    "class with a line break": (lambda path: with_stack_global(path, RAW), rankload.load),
    "class with a line break, trusted": (
        lambda path: with_stack_global(path, RAW),
        lambda path: rankload.load(path, weights_only=False),
    ),
    "class with a line break in an index": (lambda path: with_stack_global(path, RAW), rankload.open_checkpoint),
    "safetensors name": (lambda path: safetensors(path, {HOSTILE: entry(end=8)}), rankload.load),
    "safetensors dtype": (lambda path: safetensors(path, {"a": entry(HOSTILE)}), rankload.load),
    "safetensors dtype in an index": (
        lambda path: safetensors(path, {"a": entry(HOSTILE)}),
        lambda path: rankload.open_checkpoint(path)["a"],
    ),
    "part name": (
        lambda path: path.write_text(json.dumps({"weight_map": {"a": HOSTILE}})) and path,
        rankload.load,
    ),
    "name in a part": (index_that_is_wrong, rankload.load),
    "name in a part's index": (index_that_is_wrong, rankload.open_checkpoint),
    "web page": (lambda path: path.write_text(f"<html>{HOSTILE}") and path, rankload.load),
    "closed": (lambda path: save(path, {HOSTILE: torch.zeros(1)}), lambda path: _closed(path)[HOSTILE]),
}


def _closed(path: Path) -> rankload.Checkpoint:
    checkpoint = rankload.open_checkpoint(path)
    checkpoint.close()
    return checkpoint


def assert_harmless(text: str) -> None:
    lines = text.split("\n")
    assert all(line.isprintable() for line in lines), text
    assert not any(line.startswith(FORGED) for line in lines), text


@pytest.mark.fault(70)
@pytest.mark.parametrize(("write", "call"), FAILURES.values(), ids=FAILURES)
def test_names_in_errors_and_logs(tmp_path, caplog, write, call):
    path = write(tmp_path / "hostile.pth")
    with (
        caplog.at_level(logging.DEBUG, logger="rankload"),
        pytest.raises((rankload.RankloadError, ValueError)) as caught,
    ):
        call(path)
    assert_harmless(str(caught.value))
    for record in caplog.records:
        if record.name.startswith("rankload"):
            assert_harmless(record.getMessage())


@pytest.mark.parametrize(("write", "call"), FAILURES.values(), ids=FAILURES)
def test_tracebacks_show_the_causes_escaped_too(tmp_path, write, call):
    path = write(tmp_path / "hostile.pth")
    with pytest.raises((rankload.RankloadError, ValueError)) as caught:
        call(path)
    error: BaseException | None = caught.value
    while error is not None:
        shown = "".join(traceback.format_exception_only(type(error), error)).rstrip("\n")
        assert_harmless(shown)
        error = error.__cause__


def test_a_path_with_a_line_break_is_shown_in_one_line(tmp_path):
    folder = tmp_path / f"b\n{FORGED}\x1b[2J"
    folder.mkdir()
    save(folder / "model.pth", {"a": torch.zeros(1)})
    (folder / "broken.pth").write_bytes(b"PK\3\4 no")
    with rankload.open_checkpoint(folder / "model.pth") as checkpoint:
        assert_harmless(repr(checkpoint))
    calls = [("broken.pth", call) for call in (rankload.load, rankload.open_checkpoint)]
    for name, call in [*calls, ("missing.pth", rankload.load)]:
        with pytest.raises(rankload.RankloadError) as caught:
            call(folder / name)
        assert str(caught.value).isprintable()


def test_representations_are_harmless(tmp_path):
    path = save(tmp_path / "hostile.pth", {HOSTILE: torch.zeros(1), "number": HOSTILE})
    with rankload.open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == [HOSTILE]  # as data it stays what it is
        assert_harmless(repr(checkpoint))
        assert_harmless(repr(checkpoint.entries))
    report = rankload.dist_load_into(nn.Linear(1, 1), path, strict=False, progress=False)
    assert_harmless(repr(report))


def test_ordinary_names_are_shown_as_they_are(tmp_path):
    path = save(tmp_path / "größe.pth", {"größe.weight": torch.zeros(1)})
    with pytest.raises(rankload.LoadError) as caught:
        into_module(path)
    assert "1 not in the module: größe.weight\n" in str(caught.value) and "größe.pth does not fit" in str(caught.value)


# Of any length

LONG = "x" * (4 << 20)


@pytest.mark.parametrize("is_strict", [True, False])
def test_names_of_any_length_are_cut(tmp_path, is_strict):
    torch.save({LONG: torch.zeros(1), "weight": torch.zeros(1, 1)}, tmp_path / "long.pth")
    module = torch.nn.Linear(1, 1, bias=False)
    if is_strict:
        with pytest.raises(rankload.LoadError) as caught:
            rankload.dist_load_into(module, tmp_path / "long.pth", progress=False)
        shown = str(caught.value)
    else:
        report = rankload.dist_load_into(module, tmp_path / "long.pth", progress=False, strict=False)
        assert report.unexpected_keys == [LONG]
        shown = repr(report)
    assert "xxx" in shown and len(shown) < 2000


@pytest.mark.parametrize("name, dtype", [(LONG, "F32"), ("weight", LONG)], ids=["name", "dtype"])
@pytest.mark.parametrize("load", [rankload.load, lambda path: dict(rankload.open_checkpoint(path))])
def test_so_are_those_of_a_safetensors_header(tmp_path, name, dtype, load):
    header = f'{{"{name}": {{"dtype": "{dtype}", "shape": [2], "data_offsets": [0, 4]}}}}'.encode()
    (tmp_path / "long.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(rankload.LoadError) as caught:
        load(tmp_path / "long.safetensors")
    assert len(str(caught.value)) < 100_000
