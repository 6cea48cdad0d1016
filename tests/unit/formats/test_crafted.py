"""Small files that were made to cost much: each ends in an error, or is read, in a time that its size explains."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import rankload
from rankload._formats import torch_legacy as legacy
from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import GlobalName, NotUnderstoodError, Unbuilt
from rankload._formats.pickle_vm import PickleMachine
from rankload._formats.sharded import read_weight_map
from rankload._formats.sniff import sniff
from rankload._formats.source import LocalSource
from rankload._formats.torch_objects import BUILDERS
from rankload._formats.torch_tar import is_legacy_tar
from rankload._load.values.torch_values import built


@pytest.fixture(autouse=True)
def limited_time() -> Iterator[None]:
    """Each took longer, or gigabytes, before it was known."""
    begin = time.thread_time()
    yield
    assert time.thread_time() - begin < 10


def read(content: bytes) -> object:
    return PickleMachine(content, BUILDERS, [].append).next_pickle()


def saved(directory: Path, content: object) -> Path:
    torch.save(content, directory / "file.pth")
    return directory / "file.pth"


def tuples_of_tuples() -> tuple:
    """A thousand bytes in a file; written out, more than there are atoms in all."""
    value: tuple = ()
    for _ in range(120):
        value = (value, value)
    return value


def test_long_keys_above_many_values(tmp_path):
    path = saved(tmp_path, {"k" * 1_000_000: {str(number): None for number in range(2000)}})
    with pytest.raises(rankload.LoadError, match="names that are too long"):
        rankload.open_checkpoint(path)


def test_values_that_are_in_it_many_times(tmp_path):
    path = saved(tmp_path, {"x": tuples_of_tuples()})
    assert set(rankload.dist_load_state_dict_from_url(path)) == {"x"}
    with pytest.raises(rankload.LoadError, match="nested too deeply"):
        rankload.open_checkpoint(path)
    with pytest.raises(rankload.LoadError, match="1 not in the module"):
        rankload.dist_load_into(nn.Linear(1, 1), path)


def test_names_of_many_parts(tmp_path):
    path = saved(tmp_path, {"a." * 100_000: None})
    with pytest.raises(rankload.LoadError, match="1 not in the module"):
        rankload.dist_load_into(nn.Linear(1, 1), path)


def test_keys_of_one_hash():
    assert hash((-1, -1)) == hash((-1, -2))
    keys = list(itertools.product((-1, -2), repeat=9))
    assert read(pickle.dumps(dict.fromkeys(keys[:256]), 2)) == dict.fromkeys(keys[:256])
    with pytest.raises(NotUnderstoodError, match="many keys"):
        read(pickle.dumps(dict.fromkeys(keys), 2))


def test_large_numbers_of_one_hash():
    with pytest.raises(NotUnderstoodError, match="keys of an unusual kind"):
        read(pickle.dumps({number * (2**61 - 1): 0 for number in range(3)}, 2))


def test_numbers_that_leave_much_out():
    parameters = {number: None for number in range(5000, 9000) if number % 5}  # as of those that are trained
    assert read(pickle.dumps(parameters, 2)) == parameters
    with pytest.raises(NotUnderstoodError, match="many keys"):
        read(pickle.dumps({number << 20: 0 for number in range(3000)}, 2))


@pytest.mark.parametrize("key", [("a" * 65, 1), b"a" * 65, (1,) * 17])
def test_keys_that_are_long_to_show(key):
    with pytest.raises(NotUnderstoodError, match="keys of an unusual kind"):
        read(pickle.dumps({key: 0}, 2))


def test_the_memo_has_few_gaps():
    assert read(b"\x80\x02K\x07q\x01h\x01.") == 7  # Python 2 counts from 1
    with pytest.raises(NotUnderstoodError, match="malformed"):
        read(b"\x80\x02K\x07q\x02h\x01.")
    with pytest.raises(BrokenFileError, match="a memo of unusual numbers"):
        read(b"\x80\x02K\x07r\x00\x00\x01\x00.")
    with pytest.raises(NotUnderstoodError, match="malformed"):  # unpicklers disagree on the next number
        read(b"\x80\x04K\x07q\x02K\x08\x94h\x03.")


def test_sizes_in_great_number():
    note = Unbuilt(GlobalName("torch", "Size"), ((1,) * 100,))
    assert built(note) is note


def test_tensors_of_more_elements_than_can_be_counted(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(2, 3).expand(4, 2, 3)})
    sizes, larger = b"K\x04K\x02K\x03\x87", b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x02K\x03\x87"
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive, zipfile.ZipFile(path, "w") as changed:
        for member in archive.infolist():
            changed.writestr(member.filename, archive.read(member).replace(sizes, larger))
    with pytest.raises(rankload.LoadError, match="reaches beyond storage"):
        rankload.open_checkpoint(path)


def test_parameters_of_one_hash(tmp_path):
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    groups = [{"params": [number * (2**61 - 1) for number in range(20_000)]}]
    path = saved(tmp_path, {"model": module.state_dict(), "optimizer": {"state": {}, "param_groups": groups}})
    with pytest.raises(rankload.LoadError, match="param_groups are not as"):
        rankload.dist_load_into((module, optimizer), path)


def test_one_part_under_many_names(tmp_path):
    path = tmp_path / "model.index.json"
    for other in ("./part", ".//part", "x/./part", "x//part"):
        path.write_text(json.dumps({"weight_map": {"a": "part", "b": other}}))
        with path.open("rb") as file, pytest.raises(BrokenFileError, match="not beside it"):
            read_weight_map(LocalSource(file.fileno()))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_of_nothing_but_zeros(tmp_path, method):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("weights.pth", legacy.MAGIC + bytes(100_000_000))
    with pytest.raises(rankload.LoadError, match="would have 100000015 bytes"):
        rankload.open_checkpoint(path)


def test_tar_headers_with_any_length(tmp_path):
    """tarfile reads a long name at once; of a negative length it would find the same member again and again."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 10**11
    path = tmp_path / "file.tar"
    path.write_bytes(name.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with path.open("rb", buffering=0) as file:
        assert not is_legacy_tar(file)
    assert sniff(path) == "tar"


def test_tar_headers_within_each_other(tmp_path):
    """tarfile goes one level deeper for each long name."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 10
    path = tmp_path / "file.tar"
    path.write_bytes((name.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3000)
    assert sniff(path) == "tar"


def test_storages_whose_class_is_a_tuple(tmp_path):
    """Such tuples could hold each other: see `read_state_dict`."""
    path = saved(tmp_path, {"a": (weight := torch.ones(2)), "b": weight.view(2)})
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive, zipfile.ZipFile(path, "w") as changed:
        for member in archive.infolist():
            content = archive.read(member)
            # in the id of the second one's storage, which is known by then: the first one's id
            changed.writestr(member.filename, content.replace(b"((h\x03h\x04", b"((h\x03h\x07"))
    with pytest.raises(rankload.LoadError, match="a storage of the type tuple"):
        rankload.open_checkpoint(path)


def test_what_a_safetensors_header_says_of_empty_tensors(tmp_path):
    text = json.dumps({"w": {"dtype": "F32", "shape": [0, *[10**18] * 20_000], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(rankload.LoadError, match="sizes that no tensor can have"):
        rankload.open_checkpoint(path)
