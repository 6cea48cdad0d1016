"""What is made of the pieces of a tensor, against slicing the whole of it."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._load.module.copies import TensorCopy
from rankload._load.module.file_tensor import FileTensor
from rankload._load.module.regions import Region
from rankload._load.streams.assemble import TensorAssemblers
from rankload._load.streams.buckets import Bucket


class NoFiles:
    """Of which nothing is here."""

    def has(self, entry: TensorEntry) -> bool:
        return False


@st.composite
def loads(draw: st.DrawFn) -> tuple[torch.Tensor, int, Region, torch.dtype, list[int], str]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    saved = tensor.to(draw(st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex64])))
    saved = saved.permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()) and shape:
        saved = saved[:, None].expand(-1, 3, *saved.shape[1:])  # no element is its own
    offset = tuple(draw(st.integers(0, size - 1)) for size in saved.shape)
    sizes = tuple(draw(st.integers(0, size - at)) for size, at in zip(saved.shape, offset, strict=True))
    cuts = draw(st.lists(st.integers(1, max(1, saved.untyped_storage().nbytes() - 1)), max_size=4, unique=True))
    return (
        saved,
        draw(st.sampled_from([0, 1, 8, 64])),
        Region(offset, sizes),
        draw(st.sampled_from([saved.dtype, torch.complex128])),
        sorted(cuts),
        draw(st.sampled_from(["little", "big"])),
    )


@given(loads())
def test_pieces_make_the_part(load: tuple[torch.Tensor, int, Region, torch.dtype, list[int], str]) -> None:
    saved, begin, region, dtype, cuts, byte_order = load
    size = saved.untyped_storage().nbytes()
    storage = StorageEntry("0", "file", begin, size, str(saved.dtype).removeprefix("torch."))
    entry = TensorEntry("name", storage.dtype, tuple(saved.shape), saved.stride(), storage)
    written = saved.untyped_storage().clone()
    if byte_order == "big" and saved.dtype.itemsize > 1:
        written.byteswap(saved.dtype)
    content = torch.empty(0, dtype=torch.uint8).set_(written)

    edges = [0, *(cut for cut in cuts if cut < size), size]
    buckets = [Bucket("file", begin + first, begin + last) for first, last in pairwise(edges)]
    destination = torch.zeros(region.shape, dtype=dtype)
    assemblers = TensorAssemblers(
        [TensorCopy(FileTensor(entry, NoFiles(), byte_order, [], "shown"), destination, region)], buckets
    )  # type: ignore[arg-type]
    for bucket in buckets:
        piece = content.narrow(0, bucket.begin - begin, len(bucket)).clone()
        assemblers.take(bucket, piece)
        piece.fill_(255)  # the next bucket takes its place
    assemblers.check_empty()
    expected = saved[tuple(slice(at, at + count) for at, count in zip(region.offset, region.shape, strict=True))]
    assert torch.equal(destination, expected.to(dtype))
