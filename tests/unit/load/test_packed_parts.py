"""Parts of tensors that several ranks read in shares, against slicing the whole tensors."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankload._formats.read_index import read_index
from rankload._load.device import pinned
from rankload._load.module import file_tensor
from rankload._load.module.checkpoint_files import CheckpointFiles
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.regions import Region
from rankload._load.sharing.shared_reads import ALIGNMENT_BYTES, bucket_bytes
from rankload._load.streams.packed_parts import is_packable, pack, part_key

_DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.complex128]


@st.composite
def parts(draw: st.DrawFn) -> tuple[torch.Tensor, Region]:
    shape = tuple(draw(st.lists(st.integers(1, 30), max_size=3)))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(draw(st.sampled_from(_DTYPES)))
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    offset = tuple(draw(st.integers(0, size - 1)) for size in tensor.shape)
    sizes = tuple(draw(st.integers(1, size - at)) for size, at in zip(tensor.shape, offset, strict=True))
    return tensor, Region(offset, sizes)


@settings(max_examples=60)
@given(st.lists(parts(), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_shares_make_the_parts(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: list[tuple[torch.Tensor, Region]],
    alignments: int,
    ranks: int,
    may_map: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "packed"
    torch.save({str(number): tensor for number, (tensor, _) in enumerate(wanted)}, path)
    with ExitStack() as closing:
        files = CheckpointFiles(path, closing)
        files.may_map = may_map
        closing.enter_context(mock.patch.object(file_tensor, "_ROWS_BYTES", 100))
        index = read_index(files.source(files.name), files.name, files.source, is_remote=False)
        by_part = defaultdict(list)
        for number, (tensor, region) in enumerate(wanted):
            saved = FileTensor(index.tensors[str(number)], files, "little", [], "shown")
            assert is_packable(saved, region)
            for dtype in (tensor.dtype, torch.complex128):  # a part may go to several tensors
                copy = TensorCopy(saved, torch.zeros(region.shape, dtype=dtype), region)
                by_part[part_key(saved, region)].append(copy)
        size = alignments * ALIGNMENT_BYTES
        bytes_read = 0
        for bucket in pack(by_part, size):
            assert 0 < len(bucket) <= size
            content = torch.full((size,), 255, dtype=torch.uint8)
            share = -(-len(bucket) // (ranks * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
            for begin in range(0, len(bucket), share):
                bytes_read += bucket.read(content.data_ptr() + begin, begin, min(begin + share, len(bucket)))
            bucket.finish(content)
        for copies in by_part.values():
            for copy in copies:
                tensor, region = wanted[int(copy.saved.in_file.entry.name)]
                box = tuple(slice(at, at + size) for at, size in zip(region.offset, region.shape, strict=True))
                assert torch.equal(copy.destination, tensor[box].to(copy.destination.dtype))
    sizes = [region.element_count * tensor.dtype.itemsize for tensor, region in wanted]
    assert bytes_read == sum(sizes)


def test_what_is_not_packed(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(9, 7), "empty": torch.ones(0, 5)}, tmp_path / "file")
    with ExitStack() as closing:
        files = CheckpointFiles(tmp_path / "file", closing)
        index = read_index(files.source(files.name), files.name, files.source, is_remote=False)
        saved, swapped, empty = (
            FileTensor(index.tensors[name], files, byte_order, [], "shown")
            for name, byte_order in (("x", "little"), ("x", "big"), ("empty", "little"))
        )
        columns = Region((0, 2), (9, 3))
        assert is_packable(saved, columns) and not is_packable(swapped, columns)
        assert not is_packable(saved, Region((9, 0), (0, 7))) and not is_packable(empty, Region((0, 0), (0, 5)))


def test_sizes_of_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {1: 8, 2: 16, 3: 24, 4: 32, 8: 32, 16: 64, 100: 400, 128: 512, 1024: 512}
    assert {count: round(bucket_bytes(count) / (1 << 20)) for count in sizes} == sizes
    assert all(bucket_bytes(count) % (count * ALIGNMENT_BYTES) == 0 for count in sizes)
    monkeypatch.setattr(pinned, "BUFFER_BYTES", 1000)
    assert bucket_bytes(3) == 3 * 960
