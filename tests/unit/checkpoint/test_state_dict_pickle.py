"""What the standard unpickler gets to read it makes the same of as our own, and no crafted pickle gets to it."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankload._checkpoint.entry import ITEM_BYTES, StorageEntry
from rankload._checkpoint.pickle_machine import PickleMachine
from rankload._checkpoint.pickle_values import NotUnderstoodError
from rankload._checkpoint.state_dict_pickle import read_state_dict
from rankload._checkpoint.torch_objects import EXACT_BUILDERS, storage_type_of


def pickled(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def load_storage(persistent_id: object) -> StorageEntry:
    """As the archive's records do, without an archive."""
    match persistent_id:
        case ("storage", kind, str(key), str(location), int(count)) if 0 <= count < 1000:
            dtype = storage_type_of(kind)
            return StorageEntry(key, "file", 0, count * ITEM_BYTES[dtype], dtype, location)
        case _:
            raise NotUnderstoodError("a persistent id of another kind")


def read(content: bytes) -> object:
    return shown(read_state_dict(content, EXACT_BUILDERS, load_storage))


def read_by_machine(content: bytes) -> object:
    machine = PickleMachine(content, EXACT_BUILDERS, load_storage)
    value = machine.next_pickle()
    assert machine.is_exact
    return shown(value)


def shown(value: object) -> object:
    """With the order of dicts, and what is set on them."""
    if isinstance(value, dict):
        metadata = shown(getattr(value, "_metadata", None))
        return type(value), [(key, shown(item)) for key, item in value.items()], metadata
    return value


def module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv3d(1, 1, 2), nn.LSTM(3, 4)))


def tied() -> dict[str, torch.Tensor]:
    weight = torch.ones(3, 4)
    return {"a": weight, "b": weight.t(), "c/d-e:f": weight[1], "grad": torch.ones(2, requires_grad=True)}


STATE_DICTS = {
    "with-versions": module().state_dict(),
    "plain-dict": dict(module().state_dict()),
    "tied": tied(),
    "no-elements": OrderedDict(a=torch.empty(0, 3), b=torch.tensor(1)),
    "thousand": {str(number): torch.ones(()) for number in range(1000)},
    "thousands": {f"layers.{number}.weight": torch.zeros(2, 3, dtype=torch.bfloat16) for number in range(2500)},
    "every-module-twice": nn.ModuleList([module()] * 2).state_dict(),
}
OTHERS = {
    "nested": {"model": module().state_dict(), "b": torch.ones(1)},
    "same-tensor-twice": dict.fromkeys(("a", "b"), torch.ones(1)),
    "parameters": dict(module().named_parameters()),
    "numbers": {"a": torch.ones(1), "epoch": 3},
    "numbered": {1: torch.ones(1), 2: torch.ones(1)},
    "list": [torch.ones(1), torch.ones(2)],
    "empty": {},
}


@pytest.mark.parametrize("value", STATE_DICTS.values(), ids=STATE_DICTS)
def test_state_dicts_are_read_as_our_own_machine_reads_them(value):
    content = pickled(value)
    assert read(content) == read_by_machine(content)


def test_storages_on_accelerators_are_read():
    content = pickled(tied()).replace(b"X\x03\0\0\0cpu", b"X\x07\0\0\0cuda:12")
    assert {entry.storage.location for _, entry in read(content)[1]} == {"cuda:12"}
    assert read(content) == read_by_machine(content)


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_other_content_is_left_to_our_own(value):
    assert read(pickled(value)) is None


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_are_left_to_our_own(protocol):
    assert read(pickled(tied(), protocol)) is None


def test_other_attributes_are_left_to_our_own():
    value = OrderedDict(tied())
    value.note = "mine"
    assert read(pickled(value)) is None


def item(key: bytes, storage: bytes = b"0") -> bytes:
    """A tensor as torch.save writes it, where the memo has what the first one of a dict leaves there."""
    persistent_id = b"(h\x04h\x05X" + len(storage).to_bytes(4, "little") + storage + b"q\x20h\x07K\x01tq\x21Q"
    return key + b"h\x03(" + persistent_id + b"K\x00))\x89h\x00)Rq\x22tq\x23Rq\x24"


def text(value: bytes, number: int = 0x30, length: int | None = None) -> bytes:
    return b"X" + (len(value) if length is None else length).to_bytes(4, "little") + value + b"q" + bytes([number])


BEGIN = pickled(OrderedDict(a=torch.ones(()), b=torch.ones(())))[: -len(b"u.")]
CRAFTED = {
    "a-memo-of-gigabytes": item(b"X\x01\0\0\0kr\xff\xff\xff\x7f"),
    "a-key-that-is-a-tuple": item(b"h\x21"),
    "a-text-that-ends-late": item(text(b"k", length=200)),
    "a-text-that-ends-early": item(text(b"kq00u.", length=1)),
    "another-function": item(text(b"k")).replace(b"h\x03(", b"cos\nsystem\nq\x40(", 1),
    "another-class": item(text(b"k")).replace(b"h\x00)R", b"cos\nabort\nq\x40)R"),
    "an-attribute-of-a-tensor": item(text(b"k")) + b"}" + text(b"shape") + b"K\x01sb",
}


def test_what_the_crafted_ones_are_made_of_is_read():
    content = BEGIN + item(text(b"k"), b"1") + b"u."
    assert [key for key, _ in read(content)[1]] == ["a", "b", "k"]
    assert read(content) == read_by_machine(content)


@pytest.mark.parametrize("crafted", CRAFTED.values(), ids=CRAFTED)
def test_crafted_pickles_do_not_get_to_the_standard_unpickler(monkeypatch, crafted):
    def refuse(*arguments: object) -> None:
        raise AssertionError("the standard unpickler was asked")

    monkeypatch.setattr("rankload._checkpoint.state_dict_pickle._Unpickler", refuse)
    assert read(BEGIN + crafted + b"u.") is None


def test_a_module_has_no_other_numbers_than_its_version():
    """A key from the memo may be anything; machine and torch would disagree about some."""
    content = pickled(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).state_dict())
    memoized = content.index(b"version") + len(b"version")
    version = b"h" + content[memoized + 1 : memoized + 2] + b"K\x01s"
    assert content.count(version) == 2 and read(content) is not None
    for number in range(content[memoized + 1]):
        assert read(content.replace(version, b"h" + bytes([number]) + b"K\x01s", 1)) is None


def mutations() -> st.SearchStrategy[list[tuple[int, int, int]]]:
    place = st.integers(0, 1 << 16)
    return st.lists(st.tuples(st.sampled_from(range(4)), place, place), min_size=1, max_size=4)


MUTATED = [pickled(STATE_DICTS[name]) for name in ("with-versions", "plain-dict", "tied")]


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(MUTATED), mutations())
def test_what_of_a_mutated_one_is_read_our_own_reads_alike(original, changes):
    content = bytearray(original)
    for kind, place, other in changes:
        at = place % len(content)
        if kind == 0:
            content[at] = other % 256
        elif kind == 1:  # another place of the memo
            places = [i + 1 for i in range(len(content) - 1) if content[i] in b"qhrj"]
            content[places[place % len(places)]] = other % 80
        else:
            begin = other % len(content)
            content[at : at + 8 * (kind - 2)] = content[begin : begin + 8]
    found = read(bytes(content))
    assert found is None or found == read_by_machine(bytes(content))
