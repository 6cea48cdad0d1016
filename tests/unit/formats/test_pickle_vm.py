"""Pickles are read to their end whatever is in them, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_stack import GlobalName, NotUnderstoodError, Unbuilt
from rankload._formats.pickle_vm import PickleMachine
from rankload._formats.torch_objects import BUILDERS, storage_type_of

PROTOCOLS = [0, 1, 2, 3, 4, 5]


def read(content: bytes) -> object:
    return PickleMachine(content, BUILDERS, lambda persistent_id: storage_type_of(persistent_id[1])).next_pickle()


class Storage:
    """Stands for a storage."""


class StoragePickler(pickle.Pickler):
    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, "140", "cpu", 70_000, None) if isinstance(obj, Storage) else None


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers(2 - 2**61, 2**61 - 2)
plain = st.recursive(scalars, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner))


@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_values_are_what_pickle_makes_of_them(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=60))
def test_short_bytes_are_what_pickle_makes_of_them(value):
    for protocol in (2, 3, 4, 5):
        assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dicts_are_dicts(protocol):
    assert read(pickle.dumps(collections.OrderedDict(b=1, a=[2]), protocol)) == {"b": 1, "a": [2]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (complex(1, 2), "complex"),
        (Path("a"), "pathlib"),
    ],
)
def test_other_objects_are_named_and_not_built(protocol, value, name):
    found = read(pickle.dumps({"a": value, "b": 3}, protocol))
    assert isinstance(found["a"], Unbuilt) and found["b"] == 3
    if protocol >= 2:
        assert name in str(found["a"].function)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_persistent_ids_are_read_from_every_protocol(tmp_path, protocol):
    everything = {
        "numbers": [0, -1, 300, 70_000, 2**40, -(2**90), 1.5, True, None],
        "texts": ["a", "ü" * 300, "x" * 70_000, b"", b"b" * 300, bytearray(b"c")],
        "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1, 2}, frozenset({3}), {}],
        "objects": [complex(1, 2), Path("a"), range(3), slice],
        "storage": Storage(),
    }
    recursive = [everything]
    recursive.append(recursive)
    with (tmp_path / "file").open("wb") as file:
        StoragePickler(file, protocol).dump(recursive)
        StoragePickler(file, protocol).dump(["140", (1, 300)])
    content = (tmp_path / "file").read_bytes()
    persistent_ids = []
    machine = PickleMachine(content, BUILDERS, persistent_ids.append)
    machine.next_pickle()
    assert persistent_ids == [("storage", GlobalName("torch", "FloatStorage"), "140", "cpu", 70_000, None)]
    assert machine.next_pickle() == ["140", (1, 300)]
    assert machine.position == len(content)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_executed(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    found = read(pickle.dumps([Malicious()], protocol))
    assert found[0].function.name == "system" and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("malformed", [b"\x80\x02\x85.", b"\x80\x02h\x05.", b"\x80\x02t.", b"\xff.", b"gx\n.", b"."])
def test_a_malformed_pickle_is_not_understood(malformed):
    with pytest.raises(NotUnderstoodError):
        read(malformed)


def many(operations: bytes, count: int) -> bytes:
    return operations * count


#: Each would cost hours or all memory where a copy is made of what is only mentioned.
LONG_LIST = b"\x80\x02](" + many(b"K\x01", 200_000) + b"eq\x01"
LONG_TUPLE = b"\x80\x02(" + many(b"K\x01", 200_000) + b"tq\x01"
PAIRS = b"\x80\x02](" + many(b"K\x01K\x02\x86", 100_000) + b"eq\x01"
TUPLE_OF_TUPLES = b"\x80\x02)q\x01" + many(b"h\x01h\x01\x86q\x01", 80)
LONG_TEXT = b"\x80\x02X\x00\x00\x20\x00" + b"a" * (2 << 20) + b"q\x01"
CRAFTED = {
    "size": LONG_LIST + many(b"ctorch\nSize\nh\x01\x85R0", 100_000) + b".",
    "ordered-dict": PAIRS + many(b"ccollections\nOrderedDict\nh\x01\x85R0", 100_000) + b".",
    "key": LONG_TUPLE + b"}q\x02" + many(b"h\x02h\x01K\x01s0", 100_000) + b".",
    "device": LONG_TEXT + many(b"ctorch\ndevice\nh\x01\x85R", 100_000) + b".",
    "bytes": LONG_TEXT + many(b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R", 100_000) + b".",
    "shape": LONG_TUPLE + many(b"ctorch._utils\n_rebuild_tensor\n(NK\x00h\x01h\x01tR0", 100_000) + b".",
    "arguments": LONG_TUPLE + many(b"ctorch._utils\n_rebuild_tensor_v2\nh\x01R0", 100_000) + b".",
    "dtype": TUPLE_OF_TUPLES + b"ctorch._utils\n_rebuild_tensor_v3\n(NK\x00))\x89Nh\x01tR.",
    "storage-type": TUPLE_OF_TUPLES + b"(X\x07\x00\x00\x00storageh\x01X\x01\x00\x00\x000Nh\x01tQ.",
    "long-integer": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b".",
    "decimal": b"L" + b"9" * 1_000_000 + b"L\n.",
}


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED)
def test_mentioning_a_thing_many_times_costs_nothing(content):
    begin = time.thread_time()
    with contextlib.suppress(NotUnderstoodError, BrokenFileError):
        read(content)
    assert time.thread_time() - begin < 10


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_pickle_ends_in_a_value_or_one_of_two_errors(data):
    content = bytearray(pickle.dumps({"a": [1, (2.5, "x")], "d": collections.OrderedDict(k=Path("p"))}, 2))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(NotUnderstoodError, BrokenFileError):
        read(bytes(content[: data.draw(st.integers(1, len(content)))]))


def test_a_bytearray_is_not_exactly_what_it_was():
    content = pickle.dumps({"seed": bytearray(b"abc")}, protocol=5)
    machine = PickleMachine(content, BUILDERS, [].append)
    assert machine.next_pickle() == {"seed": b"abc"} and not machine.is_exact
