"""Archives of one checkpoint, torch.hub's legacy zip: what they may become, and that they become it once a node."""

from __future__ import annotations

import bz2
import io
import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankload
from harness.checkpoints import write_legacy_zip
from harness.ranks import run_ranks
from rankload._fetch.repository.unpack_repository import unpack_repository
from rankload._formats.sniff import check_structure
from rankload._formats.unpack import unpack
from rankload._formats.unpack_limit import ALWAYS_ALLOWED_BYTES, MAX_RATIO
from rankload.errors import RankLostError

MIB = 1 << 20


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))


LOADS: dict[str, Callable[[Path], Any]] = {
    "load": rankload.load,
    "trusted": lambda path: rankload.load(path, weights_only=False, mmap=False),
    "open_checkpoint": rankload.open_checkpoint,
    "from a URL": lambda path: rankload.dist_load_state_dict_from_url(path.as_uri(), progress=False),
    "into a module": lambda path: rankload.dist_load_into(Module(), path, progress=False),
}


def saved(content: Any, *, is_legacy: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not is_legacy)
    return buffer.getvalue()


def pack(path: Path, member: bytes, name: str = "weights.pth", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, member)
    return path


def declare(path: Path, size_bytes: int) -> Path:
    """Let the only member say that it has another size, in both of its headers."""
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\3\4") + 22, size_bytes)
    struct.pack_into("<I", raw, raw.rindex(b"PK\1\2") + 24, size_bytes)
    path.write_bytes(raw)
    return path


@pytest.fixture
def zeros(tmp_path: Path) -> Path:
    """An archive of a few hundred kB that would have a little more than is allowed."""
    return pack(tmp_path / "zeros.zip", saved({"weight": torch.zeros(ALWAYS_ALLOWED_BYTES // 4 + 6)}))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of temporary files."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@pytest.mark.fault(68)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_archive_may_not_grow_beyond_measure(zeros, scratch, load):
    with pytest.raises(rankload.LoadError, match=rf"zeros\.zip.*\d+ times its own.* up to {MAX_RATIO} times"):
        load(zeros)
    assert os.listdir(scratch) == []


@pytest.mark.fault(68)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_nor_if_it_declares_less(zeros, scratch, load):
    declare(zeros, 1000)
    with pytest.raises(rankload.RankloadError, match=r"zeros\.zip"):
        load(zeros)
    assert os.listdir(scratch) == []


def test_small_archives_may_grow_by_more(tmp_path):
    """Zeros shrink to a thousandth."""
    path = pack(tmp_path / "zeros.zip", saved({"weight": torch.zeros(5 * MIB)}))
    assert path.stat().st_size * 500 < 20 * MIB
    assert rankload.load(path)["weight"].count_nonzero() == 0
    assert rankload.dist_load_state_dict_from_url(path.as_uri(), progress=False)["weight"].numel() == 5 * MIB


def test_the_structure_of_an_archive_is_checked_without_unpacking_it(zeros, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", refuse)
    assert check_structure(zeros, must_be_checkpoint=True, origin="test") == "single_member_zip"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_methods_that_unpack_gigabytes_at_once_are_refused(tmp_path, method, load):
    path = pack(tmp_path / "packed.zip", saved({"weight": torch.zeros(6)}), method=method)
    with pytest.raises(rankload.RankloadError, match=r"packed\.zip"):
        load(path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_archive_in_an_archive_is_no_checkpoint(tmp_path, load):
    inner = pack(tmp_path / "inner.zip", saved({"weight": torch.zeros(6)}))
    path = pack(tmp_path / "outer.zip", inner.read_bytes(), method=zipfile.ZIP_STORED)
    with pytest.raises(rankload.LoadError, match=r"outer\.zip"):
        load(path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_index_in_an_archive_names_no_descriptors(tmp_path, load):
    """Unpacked, it lies in /dev/fd: its parts would be whatever this process has open."""
    torch.save({"weight": torch.full((6,), 7.0)}, tmp_path / "private.pth")
    with (tmp_path / "private.pth").open("rb") as private:
        index = json.dumps({"weight_map": {"weight": str(private.fileno())}})
        path = pack(tmp_path / "index.zip", index.encode())
        with pytest.raises(rankload.RankloadError, match=r"index\.zip"):
            load(path)


@pytest.mark.parametrize("content", [b"<html>", b"text"], ids=["HTML", "text"])
def test_the_name_of_a_member_is_shown_escaped(tmp_path, content):
    path = pack(tmp_path / "named.zip", content, name="a\x1b[2J\u202eb\n2026 INFO all is well")
    with pytest.raises(rankload.RankloadError) as caught:
        rankload.dist_load_state_dict_from_url(path.as_uri(), progress=False)
    assert str(caught.value).isprintable() and r"\x1b[2J" in str(caught.value)


# What the standard library's zipfile says of archives that are crafted: an error of ours, whatever it is


def crafted(path: Path, member: bytes, name: bytes = b"top/a", **fields: int) -> Path:
    """An archive of one member; fields of both headers may be anything (APPNOTE.TXT 4.3.7, 4.3.12)."""
    flags, method = fields.get("flags", 0), fields.get("method", zipfile.ZIP_STORED)
    packed, size = fields.get("packed", len(member)), fields.get("size", len(member))
    common = (20, flags, method, 0, 0x21, fields.get("crc", zlib.crc32(member)), packed, size, len(name))
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *common, 0) + name + member
    listed = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *common, 0, 0, 0, 0, 0, 0) + name
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(listed), len(local), 0)
    path.write_bytes(local + listed + end)
    return path


CRAFTED = {
    "encrypted": lambda path: crafted(path, b"x", flags=0x01),
    "name that is no UTF-8": lambda path: crafted(path, b"x", b"top/\xff", flags=0x800),
    "garbled": lambda path: crafted(path, b"\x07\xff\xff", method=zipfile.ZIP_DEFLATED, size=10),
    "cut off": lambda path: crafted(path, b"x", packed=300, size=300),
    "another checksum": lambda path: crafted(path, b"x", crc=1),
    "bzip2": lambda path: crafted(
        path, bz2.compress(bytes(9)), method=zipfile.ZIP_BZIP2, size=9, crc=zlib.crc32(bytes(9))
    ),
    "garbled bzip2": lambda path: crafted(path, b"garbled", method=zipfile.ZIP_BZIP2),
    "garbled lzma": lambda path: crafted(path, b"\x09\x04\x05\0]\0\0\0\1garbled", method=zipfile.ZIP_LZMA),
}


@pytest.mark.fault(90)
@pytest.mark.parametrize("craft", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_archive_of_a_repository_is_refused(tmp_path, craft):
    with pytest.raises(rankload.VerificationError, match=r"^https://github\.com/owner/name: "):
        unpack_repository(craft(tmp_path / "archive.zip"), tmp_path / "tree", "https://github.com/owner/name", 0o755)


@pytest.mark.fault(65)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_name_that_is_not_what_it_says_is_an_error(tmp_path, load):
    path = crafted(tmp_path / "named.zip", saved({"weight": torch.zeros(6)}), b"\xff.pth", flags=0x800)
    with pytest.raises(rankload.LoadError, match=r"named\.zip: archive of one file that cannot be unpacked"):
        load(path)


def test_what_another_rank_says_is_no_damage(tmp_path):
    """Some errors of ours are RuntimeErrors, as zipfile's are."""

    def look(done: int) -> None:
        raise RankLostError("rank 1 is gone")

    path = pack(tmp_path / "weights.zip", saved({"weight": torch.zeros(6)}))
    with (tmp_path / "unpacked").open("wb") as target, pytest.raises(RankLostError, match="rank 1 is gone"):
        unpack(path, target, look)


# Once a node


def memory_of(tensor: torch.Tensor) -> str:
    """Return device and inode of what a tensor's memory maps."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, device, inode, *_ = line.split()
        begin, end = (int(number, 16) for number in span.split("-"))
        if begin <= address < end:
            return f"{device} {inode}"
    return "none"


def load_and_tell(rank: int, path: str, delivery: str, cache: str) -> tuple[str, float]:
    content = rankload.dist_load_state_dict_from_url(path, cache, progress=False, delivery=delivery)
    return memory_of(content["weight"]), content["weight"].sum().item()


def load_into_and_tell(rank: int, path: str, delivery: str, cache: str) -> tuple[str, float]:
    with torch.device("meta"):
        module = nn.Linear(1000, 100, bias=False)
    rankload.dist_load_into(module, path, cache, progress=False, delivery=delivery)
    return memory_of(module.weight), module.weight.sum().item()


def try_to_load(rank: int, path: str, delivery: str, cache: str) -> str:
    try:
        rankload.dist_load_state_dict_from_url(path, cache, progress=False, delivery=delivery)
    except rankload.LoadError as error:
        return error.message
    return ""


@pytest.mark.fault(68)
@pytest.mark.parametrize("delivery", ["read", "broadcast"])
def test_the_ranks_of_a_node_share_what_was_unpacked(tmp_path, delivery):
    """The zip format inside is mapped: all ranks see the same memory."""
    inner = saved({"weight": torch.ones(100, 1000)}, is_legacy=False)
    path = pack(tmp_path / "shared.zip", inner)
    results = run_ranks(load_and_tell, 4, args=(str(path), delivery, str(tmp_path / "cache")))
    places, sums = zip(*(result.value for result in results), strict=True)
    assert sums == (100_000,) * 4
    assert len(set(places)) == 1 and not places[0].endswith(" 0")


@pytest.mark.parametrize("delivery", ["read", "broadcast"])
def test_so_do_modules(tmp_path, delivery):
    inner = saved({"weight": torch.ones(100, 1000)}, is_legacy=False)
    path = pack(tmp_path / "shared.zip", inner)
    results = run_ranks(load_into_and_tell, 4, args=(str(path), delivery, str(tmp_path / "cache")))
    places, sums = zip(*(result.value for result in results), strict=True)
    assert sums == (100_000,) * 4
    assert len(set(places)) == 1 and not places[0].endswith(" 0")


def test_what_goes_wrong_on_the_unpacking_rank_reaches_all(tmp_path):
    path = pack(tmp_path / "damaged.zip", saved({"weight": torch.rand(100_000)}), method=zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1  # the checksum finds it, at the very end
    path.write_bytes(raw)
    results = run_ranks(try_to_load, 4, args=(str(path), "read", str(tmp_path / "cache")))
    messages = {result.value for result in results}
    assert len(messages) == 1 and "damaged.zip: archive of one file that cannot be unpacked" in messages.pop()


def test_two_nodes_have_a_copy_each(tmp_path):
    """Ranks that cannot open each other's memory unpack for themselves; here all can, whatever the launcher says."""
    file = write_legacy_zip(tmp_path, {"weight": torch.ones(10)})
    results = run_ranks(load_and_tell, 4, nodes=2, args=(str(file.path), "read", str(tmp_path / "cache")))
    assert [result.value[1] for result in results] == [10] * 4


# torch's own format, compressed by somebody else


def _compressed(path: Path, content: dict[str, Any]) -> Path:
    with (
        zipfile.ZipFile(io.BytesIO(saved(content, is_legacy=False))) as archive,
        zipfile.ZipFile(path, "w", 8) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    return path


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    "load", [LOADS["load"], LOADS["trusted"], LOADS["from a URL"], lambda path: rankload.load(path.open("rb"))]
)
def test_compressed_tensors_may_not_grow_beyond_measure_either(tmp_path, load):
    path = _compressed(tmp_path / "zeros.pth", {"weight": torch.zeros(ALWAYS_ALLOWED_BYTES // 4 + 6)})
    with pytest.raises(rankload.LoadError, match="whose compressed members would have"):
        load(path)
    _compressed(path, {"weight": torch.zeros(5 * MIB)})
    assert load(path)["weight"].numel() == 5 * MIB
