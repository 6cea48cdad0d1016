"""Checkpoints that contradict themselves: an error on every way into memory, and never their neighbour's bytes."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_files import FIRST_VIEW, SECRET, changed, content, records_of, view, write_changed, write_records
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rankload
from rankload._cli.inspect_command import inspect


class Module(nn.Module):
    def __init__(self, device: str = "cpu", elements: int = 40) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(elements, device=device))
        self.secret = nn.Parameter(torch.zeros(64, device=device))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given


def _fake(path: Path) -> Any:
    with FakeTensorMode():
        return rankload.load(path)


LOADS: dict[str, Callable[[Path], Any]] = {
    "plain": rankload.load,
    "mapped": lambda path: rankload.load(path, mmap=True),
    "copied": lambda path: rankload.load(path, mmap=False),
    "trusted": lambda path: rankload.load(path, weights_only=False),
    "with arguments": lambda path: rankload.load(path, weights_only=False, mmap=True, encoding="latin1"),
    "callable": lambda path: rankload.load(path, lambda storage, tag: storage),
    "by tag": lambda path: rankload.load(path, {"cpu": "cpu"}),
    "meta": lambda path: rankload.load(path, "meta"),
    "fake": _fake,
    "from a URL": lambda path: rankload.dist_load_state_dict_from_url(path.as_uri(), progress=False),
}

INDEXED: dict[str, Callable[[Path], Any]] = {
    "open_checkpoint": lambda path: dict(rankload.open_checkpoint(path)),
    "into a module": lambda path: rankload.dist_load_into(Module(), path, progress=False),
    "into meta": lambda path: rankload.dist_load_into(Module("meta"), path, progress=False),
    "assigned": lambda path: rankload.dist_load_into(Module(), path, assign=True, progress=False),
}

HUGE = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"

#: By what is wrong: the changes to the pickle.
DAMAGED = {
    "storage longer than its record": [(FIRST_VIEW, view(b"K\x28", size=b"K\x28"))],
    "storage far longer than the file": [(FIRST_VIEW, view(HUGE, size=b"K\x04"))],
    "view longer than its storage": [(FIRST_VIEW, view(b"K\x04", size=b"K\x28"))],
    "view that begins too late": [(FIRST_VIEW, view(b"K\x04", b"K\x08"))],
    "view that begins before its storage": [(FIRST_VIEW, view(b"K\x04", b"J\xf8\xff\xff\xff"))],
    "view with a huge size": [(FIRST_VIEW, view(b"K\x04", size=HUGE))],
    "view with a huge offset": [(FIRST_VIEW, view(b"K\x04", HUGE))],
    "view with a negative size": [(FIRST_VIEW, view(b"K\x04", size=b"J\xff\xff\xff\xff"))],
    "view with a long stride": [(b"K\x04\x85q\x08K\x01\x85", b"K\x04\x85q\x08K\x09\x85")],
    "view with a negative stride": [(b"K\x04\x85q\x08K\x01\x85", b"K\x04\x85q\x08J\xff\xff\xff\xff\x85")],
    "untyped storage longer than its record": [
        (b"ctorch\nFloatStorage\n", b"ctorch.storage\nUntypedStorage\n"),
        (FIRST_VIEW, view(b"K\x28", size=b"K\x04")),
    ],
    "storage of wider elements": [(b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n")],
    "one storage of two lengths": [(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")],
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("load", [*LOADS.values(), *INDEXED.values()], ids=[*LOADS, *INDEXED])
@pytest.mark.parametrize("changes", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_an_error_everywhere(tmp_path, changes, load):
    path = write_changed(tmp_path / "damaged.pth", *changes)
    with pytest.raises(rankload.LoadError, match=r"damaged\.pth"):
        load(path)


@pytest.mark.parametrize("load", [*LOADS.values(), *INDEXED.values()], ids=[*LOADS, *INDEXED])
def test_the_error_names_the_file_the_storage_and_the_tensor(tmp_path, load):
    path = write_changed(tmp_path / "damaged.pth", (FIRST_VIEW, view(b"K\x28", size=b"K\x28")))
    with pytest.raises(rankload.LoadError) as caught:
        load(path)
    assert f"{path}: damaged checkpoint (storage '0' should have 160 bytes, and has 16), at 'a'" in str(caught.value)


#: Content that the index does not read: only torch.load knows what to make of it.
NOT_UNDERSTOOD = {
    "keys of many kinds": {"others": {(): {float(number): 0 for number in range(300)}}, "changes": []},
    "storage key that is a number": {"others": {}, "changes": [(b"X\x01\x00\x00\x000q\x05", b"K\x00q\x05")]},
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("how", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_torch_load_maps_nothing_that_could_not_be_checked(tmp_path, how, load):
    records = records_of(content() | how["others"])
    for old, new in how["changes"]:
        records["data.pkl"] = changed(records["data.pkl"], old, new)
    whole = rankload.load(write_records(tmp_path / "whole.pth", records))  # it is a good file, before
    assert whole["a"].tolist() == [0] * 4 and whole["secret"].tolist() == [SECRET] * 64
    records["data.pkl"] = changed(records["data.pkl"], FIRST_VIEW, view(b"K\x28", size=b"K\x28"))
    path = write_records(tmp_path / "damaged.pth", records)
    try:
        loaded = load(path)
    except rankload.LoadError as error:
        assert "damaged.pth" in str(error)
    else:  # then there are no elements that could be somebody else's
        assert loaded["a"].is_meta or type(loaded["a"]).__name__ == "FakeTensor"


def test_why_a_file_is_not_mapped_is_logged(tmp_path, caplog):
    others = {"odd": {float(number): 0 for number in range(300)}}
    path = write_changed(tmp_path / "odd.pth", **others)
    with caplog.at_level("DEBUG", logger="rankload"):
        rankload.load(path)
    assert "odd.pth is read, not mapped: its tensors cannot be checked" in caplog.text


def test_offsets_that_torch_would_compute_are_not_trusted(tmp_path, monkeypatch):
    """Between two records lies another: torch's guess would be its bytes."""
    from torch.utils.serialization import config

    records = records_of(content(note=(object,)))
    records["data/0x"] = bytes(256)
    path = write_records(tmp_path / "guess.pth", {name: records[name] for name in sorted(records)})
    monkeypatch.setattr(config.load, "calculate_storage_offsets", True)
    loaded = rankload.load(path, weights_only=False)
    assert loaded["a"].tolist() == [0] * 4 and loaded["secret"].tolist() == [SECRET] * 64


# Archives that we and torch's reader (miniz) could read in two ways


def _zip(path: Path, records: dict[str | bytes, bytes], prefix: bytes = b"", comment: bytes = b"") -> Path:
    """Write an uncompressed archive in which each payload is aligned, and names may be any bytes."""
    body, listing = io.BytesIO(), io.BytesIO()
    body.write(prefix)
    for name, record in records.items():
        raw = b"archive/" + (name if isinstance(name, bytes) else name.encode())
        offset, crc = body.tell(), zipfile.crc32(record)  # type: ignore[attr-defined]
        extra = -(offset + 30 + len(raw) + 4) % 64
        common = (20, 0, 0, 0, 0x21, crc, len(record), len(record), len(raw))
        body.write(struct.pack("<4s5H3I2H", b"PK\3\4", *common, 4 + extra))
        body.write(raw + struct.pack("<HH", 0x4246, extra) + bytes(extra) + record)
        listing.write(struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *common, 0, 0, 0, 0, 0, offset) + raw)
    begin, count = body.tell(), len(records)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, listing.tell(), begin, len(comment))
    path.write_bytes(body.getvalue() + listing.getvalue() + end + comment)
    return path


def _records(key: bytes) -> dict[str | bytes, bytes]:
    """A checkpoint whose first storage has another key, and 40 elements."""
    records: dict[str | bytes, bytes] = {**records_of(content()), "version": b"3\n"}
    pickled = changed(bytes(records["data.pkl"]), FIRST_VIEW, view(b"K\x28", size=b"K\x28"))
    key_now = b"X" + len(key).to_bytes(4, "little") + key
    records["data.pkl"] = changed(pickled, b"X\x01\x00\x00\x000q", key_now + b"q")
    return records


#: By what differs: the key in the pickle, the record that torch could find for it, and the one that is long enough.
LOOKALIKES = {
    "case": (b"A", b"data/a", b"data/A"),
    "encoding": ("é".encode(), "data/é".encode(), b"data/\x82"),
    "NUL": (b"0\0x", b"data/0", b"data/0\0x"),
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("lookalike", LOOKALIKES.values(), ids=LOOKALIKES)
@pytest.mark.parametrize(
    "load", [LOADS["plain"], LOADS["mapped"], LOADS["trusted"]], ids=["plain", "mapped", "trusted"]
)
def test_no_record_stands_in_for_another(tmp_path, lookalike, load):
    key, short, long = lookalike
    records = _records(key)
    own, secret = records.pop("data/0"), records.pop("data/1")
    for name in (short, long), (long, short):
        path = _zip(
            tmp_path / "two.pth",
            {
                **records,
                name[0]: own if name[0] == short else bytes(160),
                name[1]: own if name[1] == short else bytes(160),
                "data/1": secret,
            },
        )
        try:
            found = load(path)["a"]
        except rankload.LoadError:
            continue
        assert found.tolist() == [0] * 40  # the long one's


@pytest.mark.parametrize("load", [LOADS["mapped"], LOADS["trusted"], LOADS["plain"]])
def test_an_archive_in_a_comment_is_not_mapped_unseen(tmp_path, load):
    """torch's reader finds the last end record, we the one that ends the file: they list different records."""
    good: dict[str | bytes, bytes] = {**records_of(content()), "version": b"3\n"}
    bad = {**good, "data.pkl": changed(good["data.pkl"], FIRST_VIEW, view(b"K\x28", size=b"K\x28"))}
    hidden = _zip(tmp_path / "hidden.pth", bad).read_bytes()
    path = _zip(tmp_path / "two.pth", good, prefix=hidden[:-22], comment=hidden[-22:] + b"x")
    try:
        found = load(path)["a"]
    except rankload.LoadError:
        return
    assert found.tolist() == [0] * 4


def test_overlapping_records_are_an_error(tmp_path):
    records = {**records_of(content()), "version": b"3\n"}
    path = _zip(tmp_path / "overlap.pth", records)
    raw = bytearray(path.read_bytes())
    listed = raw.rindex(b"archive/data/0") - 46
    struct.pack_into("<2I", raw, listed + 20, 16 + 64, 16 + 64)
    path.write_bytes(raw)
    for load in (*LOADS.values(), *INDEXED.values()):
        with pytest.raises(rankload.RankloadError, match="overlaps what is next to it"):
            load(path)


# Other formats


def test_the_counts_of_a_legacy_file_are_believed_by_nobody(tmp_path):
    path = tmp_path / "legacy.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    at = raw.rindex(struct.pack("<q", 4) + bytes(16))
    path.write_bytes(raw[:at] + struct.pack("<q", 3) + raw[at + 8 :])
    for load in (LOADS["plain"], LOADS["trusted"], LOADS["from a URL"], *INDEXED.values()):
        with pytest.raises(rankload.RankloadError, match=r"legacy\.pth"):
            load(path)
    with pytest.raises(rankload.LoadError, match="should have 4 elements, and has 3"):
        rankload.open_checkpoint(path)


def _script(path: Path, *changes: tuple[bytes, bytes]) -> Path:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Module(elements=4)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    del records["version"], records[".data/serialization_id"]  # torch's writer adds them
    for old, new in changes:
        assert old in records["data.pkl"]
        records["data.pkl"] = records["data.pkl"].replace(old, new, 1)
    return write_records(path, records)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mmap", [None, True, False])
def test_a_script_whose_storage_is_longer_than_its_record_is_an_error(tmp_path, mmap):
    """torch.jit.load would take what lies behind it in memory for weights."""
    whole = rankload.load(_script(tmp_path / "whole.pt"), "cpu", weights_only=False, mmap=mmap)
    assert whole.a.tolist() == [0] * 4
    path = _script(tmp_path / "damaged.pt", (b"K\x04tQ", b"K\x28tQ"))
    with pytest.raises(rankload.LoadError, match="storage '0' should have 160 bytes, and has 16"):
        rankload.load(path, "cpu", weights_only=False, mmap=mmap)


def _safetensors(path: Path, header: str | dict[str, Any], payload: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return path


def _tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "overlap": {"a": _tensor(0, 160, [40]), "secret": _tensor(16, 272, [64])},
    "out of range": {"a": _tensor(0, 16, [4]), "secret": _tensor(16, 400, [96])},
    "before the data": {"a": _tensor(-16, 16, [8]), "secret": _tensor(16, 272, [64])},
    "gap": {"a": _tensor(0, 16, [4]), "secret": _tensor(32, 272, [60])},
    "shape too large": {"a": _tensor(0, 16, [40]), "secret": _tensor(16, 272, [64])},
    "dtype too large": {"a": _tensor(0, 16, [4], "F64"), "secret": _tensor(16, 272, [64])},
    "dtype that only torch calls so": {"a": _tensor(0, 16, [40], "float32"), "secret": _tensor(16, 272, [64])},
    "dtype of another name of torch's": {"a": _tensor(0, 16, [4096], "float"), "secret": _tensor(16, 272, [64])},
    "shape that wraps": {"a": _tensor(0, 16, [2**62, 4]), "secret": _tensor(16, 272, [64])},
    "key twice": '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
    '"a": {"dtype": "F32", "shape": [68], "data_offsets": [0, 272]}}',
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("header", SAFETENSORS.values(), ids=SAFETENSORS)
@pytest.mark.parametrize("load", [LOADS["plain"], LOADS["copied"], LOADS["from a URL"], *INDEXED.values()])
def test_a_safetensors_header_that_is_wrong_is_an_error(tmp_path, header, load):
    path = _safetensors(tmp_path / "damaged.safetensors", header, bytes(16) + struct.pack("<f", SECRET) * 64)
    with pytest.raises(rankload.RankloadError, match=r"damaged\.safetensors"):
        load(path)


# What is odd, and good


def test_odd_files_load_as_torch_loads_them(tmp_path):
    tied = torch.ones(6)
    saved = {
        "tied": tied,
        "again": tied,
        "view": tied[2:4],
        "empty": torch.zeros(0),
        "empty view": tied[6:],
        "strange empty view": torch.zeros(4).as_strided((0,), (1,), 9),
        "sparse": torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([2.0]), (3,)),
    }
    records = records_of(saved)
    without_byte_order = {name: record for name, record in records.items() if name != "byteorder"}
    lexicographic = dict(sorted(records.items()))
    paths = {}
    for name, variant in {"now": records, "old": without_byte_order, "sorted": lexicographic}.items():
        paths[name] = write_records(tmp_path / f"{name}.pth", variant)
    paths["legacy"] = tmp_path / "legacy.pth"
    torch.save(saved, paths["legacy"], _use_new_zipfile_serialization=False)
    paths["compressed"] = tmp_path / "compressed.pth"
    with zipfile.ZipFile(paths["now"]) as archive, zipfile.ZipFile(paths["compressed"], "w", 8) as packed:
        for member in archive.namelist():
            packed.writestr(member, archive.read(member))
    for path in paths.values():
        for options in ({}, {"mmap": True}, {"mmap": False}, {"weights_only": False}):
            found, expected = rankload.load(path, **options), torch.load(path, weights_only=False)
            assert repr(found) == repr(expected), (path, options)
            assert found["tied"].data_ptr() == found["again"].data_ptr()


# What torch.load leaves as it finds it: memory of this process would become weights

OPENED: dict[str, Callable[[Path], Any]] = {
    name: LOADS[name] for name in ("plain", "mapped", "copied", "trusted", "callable", "from a URL")
} | {"open file": lambda path: rankload.load(io.BytesIO(path.read_bytes()))}


def _without_storages(path: Path, others: Any) -> Path:
    """A legacy file whose list of storages is empty."""
    torch.save(content() | others, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.rindex(b"\x80\x02]q\x00(")] + b"\x80\x02]q\x00.")
    return path


@pytest.mark.fault(65)
@pytest.mark.parametrize("load", OPENED.values(), ids=OPENED)
def test_a_legacy_storage_that_is_nowhere_in_the_file_is_an_error(tmp_path, load):
    path = _without_storages(tmp_path / "nowhere.pth", {})
    with pytest.raises(rankload.RankloadError, match=r"storage '[0-9]+' is missing"):
        load(path)


@pytest.mark.parametrize("load", OPENED.values(), ids=OPENED)
def test_a_legacy_file_that_cannot_be_checked_gets_no_old_memory(tmp_path, load):
    others = NOT_UNDERSTOOD["keys of many kinds"]["others"]
    old = [torch.full((64,), SECRET) for _ in range(100)]
    del old  # the allocator hands this memory out again
    assert not load(_without_storages(tmp_path / "nowhere.pth", others))["secret"].any()
    path = tmp_path / "whole.pth"
    torch.save(content() | others, path, _use_new_zipfile_serialization=False)
    assert load(path)["secret"].tolist() == [SECRET] * 64


def _listed(path: Path, name: bytes, field: int, value: int, size_bytes: int = 2) -> Path:
    """Change a field of a member's entry in the central directory (APPNOTE.TXT 4.3.12)."""
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(name) - 46
    assert raw[entry : entry + 4] == b"PK\1\2"
    raw[entry + field : entry + field + size_bytes] = value.to_bytes(size_bytes, "little")
    path.write_bytes(raw)
    return path


FLAGS, METHOD, STORED_BYTES, ATTRIBUTES = 8, 10, 20, 38


@pytest.mark.fault(65)
@pytest.mark.parametrize("name", [b"archive/data/1", b"archive/data.pkl"])
@pytest.mark.parametrize("load", OPENED.values(), ids=OPENED)
def test_a_record_that_torch_would_take_for_a_folder_is_an_error(tmp_path, name, load):
    path = write_records(tmp_path / "archive.pth", records_of(content()))
    with pytest.raises(rankload.RankloadError, match="is a folder, and has bytes"):
        load(_listed(path, name, ATTRIBUTES, 0x10))


@pytest.mark.parametrize("load", INDEXED.values(), ids=INDEXED)
def test_so_it_is_for_the_index(tmp_path, load):
    path = write_records(tmp_path / "archive.pth", records_of(content()))
    with pytest.raises(rankload.RankloadError, match="is a folder, and has bytes"):
        load(_listed(path, b"archive/data/1", ATTRIBUTES, 0x10))


@pytest.mark.fault(65)
@pytest.mark.parametrize("flag", [0x01, 0x20, 0x40, 0x2000])
@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_an_encrypted_record_is_no_weights(tmp_path, flag, load):
    path = write_records(tmp_path / "archive.pth", records_of(content()))
    with pytest.raises(rankload.RankloadError, match="encrypted zip archive"):
        load(_listed(path, b"archive/data/1", FLAGS, flag))


def _compressed(path: Path) -> Path:
    """The same archive, deflated; its last tensor in its last member."""
    inner = {name: bytes(record) for name, record in _records(b"0").items()} | records_of(content())
    secret = inner.pop("data/1")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in (*inner.items(), ("data/1", secret)):
            archive.writestr(f"archive/{name}", record)
    return path


@pytest.mark.fault(65)
@pytest.mark.parametrize("damage", ["not deflated", "nothing packed", "cut off", "garbled"])
@pytest.mark.parametrize("load", OPENED.values(), ids=OPENED)
def test_a_compressed_record_that_cannot_be_inflated_is_an_error(tmp_path, damage, load):
    path = _compressed(tmp_path / "archive.pth")
    assert load(path)["secret"].tolist() == [SECRET] * 64
    raw = path.read_bytes()
    match damage:
        case "not deflated":
            path = _listed(write_records(path, records_of(content())), b"archive/data/1", METHOD, 8)
        case "nothing packed":
            _listed(path, b"archive/data/1", STORED_BYTES, 0, 4)
        case "cut off":
            _listed(path, b"archive/data/1", STORED_BYTES, 3, 4)
        case "garbled":
            begin = raw.index(b"archive/data/1") + len(b"archive/data/1")
            path.write_bytes(raw[:begin] + b"\x07" + raw[begin + 1 :])
    with pytest.raises(rankload.RankloadError, match=r"damaged zip archive \('archive/data/1'"):
        load(path)


BUILT = {
    "elsewhere": b"(h\x07QK\x00K\x28\x85K\x01\x85tb",
    "smaller": b"(h\x07QK\x02K\x02\x85K\x01\x85tb",
}


@pytest.mark.parametrize("state", BUILT.values(), ids=BUILT)
def test_the_state_of_a_tensor_is_left_to_torch(tmp_path, state):
    """torch.load gives the tensor another place then (`set_`): the index would still tell of the first one."""
    made = b"Rq\x0d"
    path = write_changed(tmp_path / "built.pth", (made + b"X\x06", made + state + b"X\x06"))
    with pytest.raises(rankload.LoadError, match="a tensor whose state is set"):
        rankload.open_checkpoint(path)
    try:
        expected = torch.load(path)["a"].tolist()
    except RuntimeError:
        with pytest.raises(rankload.LoadError):
            rankload.load(path)
    else:
        assert rankload.load(path)["a"].tolist() == expected


@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_a_quantized_tensor_without_a_scale_is_an_error(tmp_path, load):
    """torch makes one whose first use fails within torch."""
    records = records_of({"a": torch.zeros(4, dtype=torch.uint8), "secret": torch.zeros(4, dtype=torch.uint8)})
    records["data.pkl"] = changed(records["data.pkl"], b"ctorch\nByteStorage\n", b"ctorch\nQUInt8Storage\n")
    path = write_records(tmp_path / "quantized.pth", records)
    with pytest.raises(rankload.RankloadError, match="a quantized tensor without its scale"):
        load(path)


def _with_pickle(path: Path, value: bytes) -> Path:
    """A checkpoint whose only value is what these operations push."""
    records = records_of(content())
    records["data.pkl"] = b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."
    return write_records(path, records)


def _again(function: bytes, argument: bytes, count: int) -> bytes:
    """A list of the results of the same call, many times over: four bytes for each."""
    return b"](" + function + b"q\x01" + argument + b"q\x02R" + b"h\x01h\x02R" * count + b"e"


_TEXT = b"X\x60\xea\x00\x00" + b"m" * 60_000
_LONG_LIST = b"](" + b"K\x01" * 60_000 + b"e"
_LONG_PAIRS = b"](K\x01K\x01\x86q\x03" + b"h\x03" * 20_000 + b"e"
_LISTS = b"](" + b"](" + b"K\x01" * 100 + b"eq\x01" + b"h\x01" * 99 + b"e"
_ATTRIBUTES = b"}q\x01(" + b"".join(b"X\x04\0\0\0%04dK\x01" % number for number in range(2000)) + b"u"

#: torch would take hours to say no, or gigabytes, or give memory that was never written to.
ENDLESS = {
    "name of a class": (b"c" + b"m" * (1 << 20) + b"\nx\n)R", "names a class or function by more than"),
    "text that is called": (b"X\x00\x00\x10\x00" + b"m" * (1 << 20) + b")R", "calls what is not a function"),
    "text too long to be kept": (b"X\x01\x00\x00\x01" + b"m" * ((1 << 24) + 1) + b")R", "calls what is not a function"),
    "tensor of a size": (b"ctorch\nFloatTensor\nK\x40\x85R", r"a torch\.FloatTensor with a size"),
    "new tensor of a size": (b"ctorch\nTensor\nK\x40\x85\x81", r"a torch\.Tensor with a size"),
    "storage of a size": (b"ctorch.storage\nUntypedStorage\nK\x40\x85R", "UntypedStorage with a size"),
    "bytearray of a size": (b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R", "a bytearray with a size"),
    "text encoded again and again": (
        _again(b"c_codecs\nencode\n", _TEXT + b"X\x06\x00\x00\x00latin1\x86", 100),
        "copies the same values",
    ),
    "list copied again and again": (_again(b"c__builtin__\nbytearray\n", _LONG_LIST + b"\x85", 100), "copies the same"),
    "pairs copied again and again": (
        _again(b"ccollections\nOrderedDict\n", _LONG_PAIRS + b"\x85", 200),
        "copies the same",
    ),
    "tensor of numbers again and again": (
        _again(b"ctorch\nFloatTensor\n", _LONG_LIST + b"\x85", 100),
        "copies the same",
    ),
    "tensor of one list many times": (b"ctorch\nFloatTensor\n" + _LISTS + b"\x85R", "holds more than numbers"),
    "attributes set again and again": (
        b"ccollections\nOrderedDict\n)R" + _ATTRIBUTES + b"b" + b"h\x01b" * 2000,
        "copies the same values",
    ),
    "arguments in a list": (b"c__builtin__\nset\n]" + _LONG_LIST + b"aR", "whose arguments are no tuple"),
}


@pytest.mark.parametrize("value, message", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_what_torch_would_not_refuse_in_time_is_refused_before(tmp_path, value, message, load):
    with pytest.raises(rankload.LoadError, match=message):
        load(_with_pickle(tmp_path / "endless.pth", value))


def test_halves_of_surrogate_pairs_keep_names_apart(tmp_path):
    names = [f"a{chr(code)}" for code in (0xD800, 0xD801, 0xFFFD)]
    saved = {name: torch.full((1,), float(number)) for number, name in enumerate(names)}
    torch.save(saved, tmp_path / "halves.pth")
    found = rankload.open_checkpoint(tmp_path / "halves.pth")
    assert {name: found[name].item() for name in found} == {name: tensor.item() for name, tensor in saved.items()}
    assert list(rankload.load(tmp_path / "halves.pth")) == list(saved)


def test_the_same_pairs_make_two_dicts(tmp_path):
    """As Python 2 saved dicts that keep their order."""
    path = _with_pickle(tmp_path / "pairs.pth", _again(b"ccollections\nOrderedDict\n", b"]K\x01K\x02\x86a\x85", 1))
    assert torch.load(path)["a"] == [{1: 2}, {1: 2}]
    assert dict(rankload.open_checkpoint(path).remainder) == {"a.0.1": 2, "a.1.1": 2}


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_views_of_nothing_keep_their_dtypes(tmp_path, is_legacy):
    """torch.save gives them one storage."""
    empty = torch.zeros(0)
    saved = {"a": empty, "b": empty.view(torch.int32), "c": empty.view(torch.bfloat16)}
    torch.save(saved, tmp_path / "empty.pth", _use_new_zipfile_serialization=not is_legacy)
    for load in (torch.load, rankload.load, rankload.open_checkpoint):
        found = load(tmp_path / "empty.pth")
        assert {name: found[name].dtype for name in saved} == {name: tensor.dtype for name, tensor in saved.items()}


def test_a_size_is_what_it_was_when_it_was_made(tmp_path):
    """Its list grows afterwards."""
    items = b"X\x01\0\0\0sctorch\nSize\n]q\x01K\x01a\x85RX\x01\0\0\0lh\x01K\x02a"
    path = _with_pickle(tmp_path / "size.pth", b"}(" + items + b"u")
    assert torch.load(path)["a"] == rankload.load(path)["a"] == {"s": torch.Size([1]), "l": [1, 2]}
    assert rankload.open_checkpoint(path).remainder["a.s"] != torch.Size([1, 2])


def _place(key: bytes, offset: int) -> bytes:
    """The place of four elements in a storage, as torch 0.3 pickled it."""
    return b"(X" + struct.pack("<I", len(key)) + key + bytes([ord("K"), offset]) + b"K\x04t"


#: What two tensors of a legacy file say of their places in one storage, and the second's class. torch knows views by
#: their keys alone, and takes the second for something else.
VIEWS = {
    "one key for two": (_place(b"v", 4), _place(b"v", 0), b""),
    "key of the storage": (b"N", _place(b"KEY", 4), b""),
    "another class": (b"N", _place(b"v", 4), b"ctorch\nIntStorage\n"),
}


@pytest.mark.parametrize("first, second, kind", VIEWS.values(), ids=VIEWS)
def test_a_view_that_is_another_for_torch_is_left_to_torch(tmp_path, first, second, kind):
    path, whole = tmp_path / "views.pth", torch.arange(8.0)
    torch.save({"a": whole[:4], "b": whole[:4]}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    key = re.findall(rb"[0-9]{6,}", raw)[-1]
    second = second.replace(b"\x03\0\0\0KEY", bytes([len(key)]) + b"\0\0\0" + key)
    head, middle, tail = raw.split(b"K\x08N")
    if kind:
        middle = re.sub(rb"(\(\(h.)h.", lambda found: found[1] + kind, middle, flags=re.DOTALL)
    path.write_bytes(head + b"K\x08" + first + middle + b"K\x08" + second + tail)
    assert str(rankload.load(path)) == str(torch.load(path))
    with pytest.raises(rankload.LoadError, match="no index"):
        rankload.open_checkpoint(path)


# More ways to memory that nobody has written


def _with_hidden_listing(path: Path) -> Path:
    """An archive with another listing that only torch's reader finds, in which a tensor's record is a folder."""
    _zip(path, {**records_of(content()), "version": b"3\n"})
    raw = path.read_bytes()
    listing = raw.index(b"PK\1\2")
    hidden = _listed(path, b"archive/data/1", ATTRIBUTES, 0x10).read_bytes()[listing:]
    shifted, length = bytearray(raw[-22:]), len(raw) - 22 - listing
    struct.pack_into("<I", shifted, 16, listing + length)
    end = shifted[:20] + struct.pack("<H", 23)
    path.write_bytes(raw[:listing] + hidden[:-22] + raw[listing:-22] + end + hidden[-22:] + b"x")
    return path


@pytest.mark.fault(65)
@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_an_archive_with_two_listings_is_an_error(tmp_path, load):
    path = _with_hidden_listing(tmp_path / "two.pth")
    assert torch.load(path, weights_only=True)["a"].tolist() == [0] * 4  # it does not look into the other tensor
    with pytest.raises(rankload.RankloadError, match="could see other members"):
        load(path)


@pytest.mark.fault(65)
def test_a_checkpoint_in_capitals_is_none_in_an_open_file_either(tmp_path):
    """torch's reader finds it all the same, and nobody would have checked its records."""
    records = {name.replace("data.pkl", "DATA.PKL"): record for name, record in records_of(content()).items()}
    path = _zip(tmp_path / "capitals.pth", {**records, "version": b"3\n"})
    assert "secret" in torch.load(path, weights_only=True)
    for load in (rankload.load, lambda path: rankload.load(io.BytesIO(path.read_bytes()))):
        with pytest.raises(rankload.LoadError, match=r"a zip archive that torch\.save did not write"):
            load(path)


def _global(name: str) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


_FLOATS, _MANY, _SUBCLASS = _global("torch.FloatTensor"), b"M\xe8\x03", _global("torch._tensor._rebuild_from_type_v2")
_ODD_KEY = b"}(" + b"K\x01" * 17 + b"tK\x01s"

#: Pickles of a tensor of a thousand elements and no content, each of which weights_only=True allows.
MADE_OF_NOTHING = {
    "size": _FLOATS + _MANY + b"\x85R",
    "arguments in a list": _FLOATS + b"]" + _MANY + b"aR",
    "arguments in a dict": _FLOATS + b"}" + _MANY + b"NsR",
    "many arguments": _FLOATS + b"(" + b"K\x01" * 20 + _MANY + b"tR",
    "subclass": _SUBCLASS + b"(" + _FLOATS + _global("torch.Tensor") + b"]" + _MANY + b"a}tR",
    "subclass of a subclass": _SUBCLASS
    + b"("
    + _SUBCLASS
    + _global("torch.Tensor")
    + b"("
    + _FLOATS
    + _global("torch.Tensor")
    + _MANY
    + b"\x85}t}tR",
    "behind what is not understood": b"(" + _ODD_KEY + _FLOATS + _MANY + b"\x85Rt",
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("pickled", MADE_OF_NOTHING.values(), ids=MADE_OF_NOTHING)
@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_a_tensor_of_a_size_without_content_is_an_error(tmp_path, pickled, is_legacy, load):
    saved = {"a": None, "secret": torch.zeros(64)}
    path = tmp_path / "nothing.pth"
    if is_legacy:
        torch.save(saved, path, _use_new_zipfile_serialization=False)
        path.write_bytes(changed(path.read_bytes(), b"aq\x01N", b"aq\x01" + pickled))
    else:
        records = records_of(saved)
        write_records(path, records | {"data.pkl": changed(records["data.pkl"], b"aq\x01N", b"aq\x01" + pickled)})
    torch.load(path, weights_only=True)
    with pytest.raises(rankload.RankloadError, match="damaged checkpoint"):
        load(path)


@pytest.mark.fault(65)
@pytest.mark.parametrize("load", OPENED.values(), ids=OPENED)
def test_no_storage_of_a_legacy_file_grows_for_a_tensor(tmp_path, load):
    """torch makes the storages of legacy files longer than the file says, for tensors that only it understands."""
    path = tmp_path / "grown.pth"
    quantized = torch.quantize_per_tensor(torch.zeros(8), 1.0, 0, torch.qint8)
    torch.save({"a": quantized, "secret": torch.zeros(64)}, path, _use_new_zipfile_serialization=False)
    assert load(path)["a"].int_repr().tolist() == [0] * 8
    path.write_bytes(changed(path.read_bytes(), b"K\x08\x85", b"M\xe8\x03\x85"))
    with pytest.raises(rankload.RankloadError):
        load(path)


# Numbers and archives on which a reader itself fails: an error of ours all the same


def _with_header_at(path: Path, offset: int) -> Path:
    """An archive whose directory says in 64 bits where the header of its first tensor is (APPNOTE.TXT 4.5.3)."""
    raw = _zip(path, {**records_of(content()), "version": b"3\n"}).read_bytes()
    name = raw.rindex(b"archive/data/0")
    entry = bytearray(raw[name - 46 : name])
    extra = struct.pack("<2HQ", 1, 8, offset)
    struct.pack_into("<H", entry, 30, len(extra))
    struct.pack_into("<I", entry, 42, 0xFFFFFFFF)
    end = bytearray(raw[-22:])
    struct.pack_into("<I", end, 12, struct.unpack_from("<I", end, 12)[0] + len(extra))
    behind = name + len(b"archive/data/0")
    path.write_bytes(raw[: name - 46] + entry + raw[name:behind] + extra + raw[behind:-22] + end)
    return path


@pytest.mark.fault(65)
@pytest.mark.parametrize("offset", [1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_a_header_beyond_any_file_is_an_error(tmp_path, offset, load):
    path = _with_header_at(tmp_path / "archive.pth", offset)
    with pytest.raises(rankload.RankloadError, match=r"no header of 'archive/data/0'"):
        load(path)


def _tar_header(kind: bytes, size: bytes, *, is_extended: bool = False) -> bytes:
    """A header of a GNU archive (tar(5)), with its checksum."""
    header = bytearray(tarfile.TarInfo("storages").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[482] = size, kind, is_extended
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    return bytes(header)


_NEGATIVE = b"\xff" + ((1 << 88) - 5000).to_bytes(11, "big")
TARS = {
    "map of a sparse file, cut off": _tar_header(b"S", b"00000000012\0", is_extended=True),
    "negative size": _tar_header(b"0", _NEGATIVE) + bytes(10_240),
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("content", TARS.values(), ids=TARS)
@pytest.mark.parametrize("load", [*OPENED.values(), *INDEXED.values()], ids=[*OPENED, *INDEXED])
def test_a_tar_archive_on_which_tarfile_fails_is_an_error(tmp_path, content, load):
    (tmp_path / "archive.tar").write_bytes(content)
    with pytest.raises(rankload.RankloadError) as caught:
        load(tmp_path / "archive.tar")
    assert isinstance(caught.value, (rankload.LoadError, rankload.VerificationError))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F3_OF_TOMORROW"])
def test_a_dtype_that_nobody_knows_is_listed(tmp_path, dtype, capsys):
    path = _safetensors(tmp_path / "new.safetensors", {"a": _tensor(0, 3, [4], dtype)}, bytes(3))
    with rankload.open_checkpoint(path) as checkpoint:
        assert (checkpoint.entries["a"].size_bytes, checkpoint.entries["a"].length) == (3, 3)
        assert checkpoint.entries["a"].is_contiguous
    inspect(str(path))
    assert dtype in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such dtype")
def test_pairs_of_four_bits_are_not_converted(tmp_path):
    """torch has no such copy, and says that it had."""
    header = {"a": _tensor(0, 40, [80], "F4"), "secret": _tensor(40, 296, [64])}
    path = _safetensors(tmp_path / "pairs.safetensors", header, bytes(296))
    INDEXED["assigned"](path)
    with pytest.raises(rankload.LoadError, match=r"float4_e2m1fn_x2 in the checkpoint cannot be converted"):
        INDEXED["into a module"](path)


#: State dicts of Adam that no Adam has made.
STATES = {
    "number": 1,
    "tensor": torch.zeros(1),
    "no steps": {number: {"exp_avg": torch.zeros(1)} for number in (0, 1)},
    "odd steps": {number: {"step": torch.float32, "exp_avg": 1, "exp_avg_sq": ()} for number in (0, 1)},
    "lists": {0: [], 1: [torch.zeros(1)]},
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_an_optimizer_state_of_another_kind_is_an_error(tmp_path, state):
    module = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(module.parameters())
    saved = {"model": module.state_dict(), "optimizer": {**optimizer.state_dict(), "state": state}}
    torch.save(saved, tmp_path / "training.pth")
    with pytest.raises(rankload.LoadError, match=r"training\.pth"):
        rankload.dist_load_into((module, optimizer), tmp_path / "training.pth", progress=False)


@pytest.mark.fault(65)
def test_what_lies_between_two_records_is_no_weights_from_afar(tmp_path, origin):
    """The place of a remote tensor is inferred from what is behind it."""
    records = {**records_of(content(last=torch.zeros(4))), "version": b"3\n"}
    gap = struct.pack("<f", 666.0) * 16
    path = _zip(tmp_path / "gap.pth", {**records, "data/1": records["data/1"] + gap})
    raw, size = bytearray(path.read_bytes()), len(records["data/1"])
    listed, local = raw.rindex(b"archive/data/1") - 46, raw.index(b"archive/data/1") - 30
    struct.pack_into("<2I", raw, listed + 20, size, size)
    struct.pack_into("<2I", raw, local + 18, size, size)
    path.write_bytes(raw)
    for load in (torch.load, rankload.load, rankload.open_checkpoint):
        assert load(path)["secret"].tolist() == [SECRET] * 64
    with rankload.open_checkpoint(origin.add("gap.pth", path)) as checkpoint:
        assert checkpoint["a"].tolist() == checkpoint["last"].tolist() == [0] * 4
        for _ in range(2):
            with pytest.raises(rankload.LoadError, match=r"gap\.pth: damaged zip archive \('archive/data/1'"):
                print(checkpoint["secret"])
