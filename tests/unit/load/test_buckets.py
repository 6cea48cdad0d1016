"""Which bytes travel, and in what pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.read_index import read_index
from rankload._formats.source import LocalSource, Source
from rankload._load.streams import buckets
from rankload._load.streams.buckets import Bucket, covers, cut, header_ranges, tensor_ranges


def entry(name: str, offset: int, length: int, file: str = "a", dtype: str = "uint8") -> TensorEntry:
    item_bytes = {"uint8": 1, "float32": 4}[dtype]
    storage = StorageEntry(name, file, offset, length, dtype)
    return TensorEntry(name, dtype, (length // item_bytes,), (1,), storage)


K = 1 << 10
M = 1 << 20


def test_headers_are_all_but_large_tensors() -> None:
    tensors = [entry("x", 100, 100 * K), entry("small", 100 * K + 100, 1 * K), entry("y", 200 * K, 100 * K, "b")]
    sizes = {"a": 200 * K, "b": 300 * K, "index": 50}
    assert header_ranges(sizes, [tensor.storage for tensor in tensors]) == {
        "a": [(0, 100), (100 * K + 100, 200 * K)],
        "b": [(0, 200 * K)],
        "index": [(0, 50)],
    }


def test_an_empty_tensor_puts_no_large_one_into_the_headers() -> None:
    large, empty = entry("large", 100, 100 * K), entry("empty", 100, 0)
    for tensors in ([large, empty], [empty, large]):
        assert header_ranges({"a": 100 * K + 100}, [tensor.storage for tensor in tensors]) == {"a": [(0, 100)]}


def _parameter_with_state() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(100 * K))
    parameter.group = "slow"
    return parameter


_ODD = {
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(100 * K), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.sparse_coo_tensor(torch.arange(100 * K)[None], torch.ones(100 * K)),
    "conjugated": lambda: torch.ones(100 * K, dtype=torch.complex64).conj(),
    "storage": lambda: torch.ones(100 * K).untyped_storage(),
    "parameter-with-state": _parameter_with_state,
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("odd", _ODD)
def test_the_bytes_of_what_is_no_plain_tensor_are_no_headers(tmp_path: Path, odd: str, is_zip: bool) -> None:
    path = tmp_path / "checkpoint"
    torch.save({"odd": _ODD[odd](), "weight": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    with path.open("rb") as file:
        source = LocalSource(file.fileno())
        index = read_index(source, "checkpoint", _no_part, is_remote=False)
        kept = header_ranges({"checkpoint": source.size_bytes}, index.storages)["checkpoint"]
        assert sum(end - begin for begin, end in kept) < 10 * K
        received = bytearray(source.size_bytes)
        for begin, end in kept:
            received[begin:end] = source.read(end - begin, begin)
    again = read_index(_Received(received), "checkpoint", _no_part, is_remote=False)
    assert again.tensors == index.tensors and again.storages == index.storages


def _no_part(name: str) -> Source:
    raise AssertionError(f"one file, without {name}")


class _Received:
    """What has come of a file."""

    def __init__(self, content: bytearray) -> None:
        self.content, self.size_bytes = content, len(content)

    def read(self, length: int, offset: int) -> bytes:
        return bytes(self.content[offset : offset + length])


@pytest.mark.parametrize(("size", "are_kept"), [(60 * K, False), (4 * K, True)])
def test_many_small_tensors_are_too_much_for_the_headers(size: int, are_kept: bool) -> None:
    count = 2000
    tensors = [entry(str(number), number * size, size) for number in range(count)]
    kept = header_ranges({"a": count * size}, [tensor.storage for tensor in tensors])["a"]
    assert (kept == [(0, count * size)]) == are_kept and (kept == []) == (not are_kept)


def test_only_what_is_wanted_travels_and_small_gaps_do() -> None:
    tensors = [
        entry("x", 0, 100 * K),
        entry("y", 110 * K, 100 * K),
        entry("z", 900 * K, 100 * K),
        entry("w", 0, 9, "b"),
    ]
    assert tensor_ranges(tensors, {}) == {"a": [(0, 210 * K), (900 * K, 1000 * K)], "b": [(0, 9)]}
    assert tensor_ranges(tensors, {"a": [(0, 500 * K)], "b": [(0, 8)]}) == {"a": [(900 * K, 1000 * K)], "b": [(0, 9)]}
    assert tensor_ranges([entry("none", 5, 0)], {}) == {}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 10)), max_size=8), st.integers(0, 60), st.integers(1, 9))
def test_covers(pieces: list[tuple[int, int]], begin: int, length: int) -> None:
    ranges = buckets._merged([(at, at + size) for at, size in pieces], 0)
    bytes_there = {byte for first, last in ranges for byte in range(first, last)}
    assert covers(ranges, begin, begin + length) == (bytes_there >= set(range(begin, begin + length)))


def test_tensors_are_cut_between_elements() -> None:
    tensors = [entry("x", 3, 20 * M, dtype="float32"), entry("y", 3 + 20 * M, 5, dtype="uint8")]
    found = cut({"a": [(3, 20 * M + 8)]}, tensors)
    assert found == [Bucket("a", 3, 3 + 8 * M), Bucket("a", 3 + 8 * M, 3 + 16 * M), Bucket("a", 3 + 16 * M, 20 * M + 8)]
    late = entry("late", 101, 30 * M, dtype="float32")
    first, *_ = cut({"a": [(0, 30 * M)]}, [late])
    assert (first.end - 101) % 4 == 0 and 8 * M - 64 < len(first) <= 8 * M
