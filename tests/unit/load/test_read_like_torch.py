"""What is read from torch's zip format is what torch.load makes of it."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import OTHER, PLAIN, Odd, holding_itself, with_metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.checkpoints import assert_same
from rankload import LoadError, open_checkpoint
from rankload._load.state_dict.read_checkpoint import read_checkpoint


@pytest.fixture
def torch_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call of torch.load."""
    calls: list[str] = []
    load = torch.load

    def noting(f: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(str(f))
        return load(f, *arguments, **keywords)

    monkeypatch.setattr(torch, "load", noting)
    return calls


@pytest.mark.parametrize("weights_only", [True, False, None])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_content(
    tmp_path: Path, torch_loads: list[str], kind: str, protocol: int, weights_only: bool | None
) -> None:
    torch.save(PLAIN[kind](), tmp_path / "file.pth", pickle_protocol=protocol)
    found = read_checkpoint(tmp_path / "file.pth", weights_only=weights_only)
    assert not torch_loads, "it is built from the index"
    assert_alike(found, torch.load(tmp_path / "file.pth", weights_only=False))


def test_what_holds_itself_does_so_again(tmp_path: Path) -> None:
    torch.save(holding_itself(), tmp_path / "file.pth")
    found = read_checkpoint(tmp_path / "file.pth")
    assert found["self"][0] is found and found["weight"].tolist() == [1, 1, 1]


def test_what_is_one_object_stays_one(tmp_path: Path) -> None:
    weight, names = torch.ones(3), ["a"]
    torch.save({"a": weight, "b": [weight], "names": names, "again": names}, tmp_path / "file.pth")
    found = read_checkpoint(tmp_path / "file.pth")
    assert found["a"] is found["b"][0] and found["names"] is found["again"]


@pytest.mark.parametrize("kind", OTHER)
def test_other_content(tmp_path: Path, torch_loads: list[str], kind: str) -> None:
    torch.save(OTHER[kind](), tmp_path / "file.pth")
    with torch.serialization.safe_globals([Odd]):
        found = read_checkpoint(tmp_path / "file.pth")
        assert len(torch_loads) == 1
        expected = torch.load(tmp_path / "file.pth", weights_only=True)
    assert repr(found) == repr(expected) and type(found) is type(expected)
    assert getattr(found, "__dict__", None) == getattr(expected, "__dict__", None)


def test_meta_tensors_know_where_their_bytes_are(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "file.pth")
    for place in ("meta", torch.device("meta")):
        found = read_checkpoint(tmp_path / "file.pth", place)["weight"]
        assert found.is_meta and found.untyped_storage()._checkpoint_offset > 0


def test_a_later_version_of_the_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"weight": torch.ones(3)}, path)
    content = path.read_bytes()
    at = content.index(b"3\n", content.index(b"file/version"))
    path.write_bytes(content[:at] + b"99"[:2] + content[at + 2 :])
    with pytest.raises(LoadError, match="version 99"):
        read_checkpoint(path)


@pytest.mark.parametrize("place", [None, "meta", lambda storage, tag: storage.clone()], ids=["mapped", "meta", "own"])
def test_a_length_that_is_a_lie_gives_no_tensor(tmp_path: Path, place: Any) -> None:
    """In the pickle and the directory alone: the record has 70,000 bytes."""
    path, lie = tmp_path / "file.pth", 2_000_000_000
    torch.save({"weight": torch.ones(70_000, dtype=torch.uint8)}, path)
    content = bytearray(path.read_bytes().replace(struct.pack("<ci", b"J", 70_000), struct.pack("<ci", b"J", lie)))
    listed_at = content.rindex(b"file/data/0") - 46  # APPNOTE.TXT 4.3.12: the name follows 46 bytes, of which
    struct.pack_into("<I", content, listed_at + 24, lie)  # these are the length of what is unpacked
    path.write_bytes(content)
    with pytest.raises(LoadError):
        read_checkpoint(path, place)
    with pytest.raises(LoadError, match="two lengths"):
        open_checkpoint(path)


def test_a_hostile_name_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "file.pth", list[str]()
    torch.save({"weight": torch.ones(3), "what": torch.float16}, path)
    path.write_bytes(path.read_bytes().replace(b"ctorch\nfloat16\n", b"ctorch\n_export\n"))
    monkeypatch.setattr(torch, "__getattr__", asked.append)  # where torch imports submodules
    monkeypatch.delattr(torch, "_export", raising=False)
    with pytest.raises(LoadError):
        read_checkpoint(path)
    assert "_export" not in asked


@pytest.mark.parametrize("options", [{"mmap": False}, {"weights_only": False, "encoding": "utf-8"}])
def test_what_is_asked_for_specially_is_left_to_torch(
    tmp_path: Path, torch_loads: list[str], options: dict[str, Any]
) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "file.pth")
    read_checkpoint(tmp_path / "file.pth", **options)
    assert len(torch_loads) == 1


def test_a_mode_that_makes_fake_tensors_has_its_say(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "file.pth")
    with FakeTensorMode():
        # in another thread there is none
        assert (
            type(ThreadPoolExecutor().submit(read_checkpoint, tmp_path / "file.pth").result()["weight"]) is torch.Tensor
        )
        found = read_checkpoint(tmp_path / "file.pth")
    assert type(found["weight"]).__name__ == "FakeTensor"


@pytest.mark.parametrize("says", [True, False], ids=["said", "not-said"])
@pytest.mark.parametrize("default", [None, torch.serialization.LoadEndianness.BIG], ids=["default", "big"])
def test_elements_of_which_the_file_does_not_say_the_byte_order(tmp_path: Path, says: bool, default: Any) -> None:
    path = tmp_path / "file.pth"
    torch.save({"weight": torch.arange(3, dtype=torch.int16)}, path)
    if not says:  # as before torch 2.1
        path.write_bytes(path.read_bytes().replace(b"/byteorder", b"/something"))
    torch.serialization.set_default_load_endianness(default)
    try:
        found = read_checkpoint(path)
    finally:
        torch.serialization.set_default_load_endianness(None)
    is_swapped = default is not None and not says
    assert found["weight"].tolist() == ([0, 256, 512] if is_swapped else [0, 1, 2])


def test_a_function_is_asked_once_for_each_storage_in_the_order_of_the_file(tmp_path: Path) -> None:
    torch.save({"model": with_metadata(), "late": torch.ones(4)}, tmp_path / "file.pth")
    path, seen, by_torch = tmp_path / "file.pth", list[Any](), list[Any]()
    read_checkpoint(path, lambda storage, tag: seen.append((tag, storage.tolist())))
    torch.load(path, lambda storage, tag: by_torch.append((tag, storage.tolist())))
    assert seen == by_torch and len(seen) == 8


def test_that_order_is_the_pickles_also_where_records_lie_in_another(tmp_path: Path) -> None:
    """torch wrote them sorted by their names once: 0, 1, 10, 11, 2."""
    path, seen = tmp_path / "file.pth", list[Any]()
    torch.save([torch.full((1,), number, dtype=torch.uint8) for number in range(13)], path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    writer = torch._C.PyTorchFileWriter(str(path))  # type: ignore[attr-defined]
    for name in sorted(name for name in members if name == "data.pkl" or name.startswith("data/")):
        writer.write_record(name, members[name], len(members[name]))
    writer.write_end_of_file()
    assert [value.item() for value in read_checkpoint(path, lambda storage, tag: seen.extend(storage))] == [*range(13)]
    assert seen == [*range(13)]


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "file.pth")
    read_checkpoint(tmp_path / "file.pth")["weight"].zero_()
    assert read_checkpoint(tmp_path / "file.pth")["weight"].tolist() == [1, 1, 1]


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, (dict, list)):
        assert_same(found, expected)
    else:
        assert_same([found], [expected])
    assert repr(getattr(found, "_metadata", None)) == repr(getattr(expected, "_metadata", None))
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        assert (type(one), one.requires_grad) == (type(other), other.requires_grad)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    for value in (
        content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    ):
        yield from _tensors(value)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.integers(0, 5).map(lambda size: torch.arange(size * 2.0).view(size, 2)),
    st.integers(0, 5).map(lambda size: torch.arange(size).to(torch.int16)),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
)  # fmt: skip
CONTENT = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.booleans()), inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=4).map(OrderedDict),
        inner.map(lambda value: [value, value]),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENT)
def test_any_nested_content_is_what_torch_load_makes_of_it(tmp_path: Path, content: Any) -> None:
    torch.save([content], tmp_path / "file.pth")
    assert_same(read_checkpoint(tmp_path / "file.pth"), torch.load(tmp_path / "file.pth", weights_only=True))


def test_a_pickle_that_does_what_no_writer_does_is_refused(tmp_path: Path) -> None:
    """Items for a list that is none: passed over in an index, refused by torch."""
    buffer = io.BytesIO()
    torch.save({"weight": [1]}, buffer)
    broken = buffer.getvalue().replace(pickle.EMPTY_LIST, pickle.EMPTY_TUPLE)
    (tmp_path / "file.pth").write_bytes(broken)
    with pytest.raises(Exception, match="append"):
        read_checkpoint(tmp_path / "file.pth")
