"""Checkpoints that were damaged or crafted: real ones, changed in a few bytes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

#: The elements of the tensor that lies behind the one that is damaged. None of them may turn up in another tensor.
SECRET = 7.0

#: In the pickle of `content`: the number of elements of the first storage, then offset and shape of its view.
FIRST_VIEW = b"K\x04tq\x07QK\x00K\x04\x85"

#: Metadata that torch's writer adds by itself.
_WRITTEN_BY_TORCH = ("version", ".data/serialization_id")


def content(**others: Any) -> dict[str, Any]:
    """A small tensor, its neighbour in the file, and whatever else is to be saved behind them."""
    return {"a": torch.zeros(4), "secret": torch.full((64,), SECRET), **others}


def records_of(saved: Any) -> dict[str, bytes]:
    """Return the records of a checkpoint in torch's zip format by their names, without the root folder."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: record for name, record in records.items() if name not in _WRITTEN_BY_TORCH}


def write_records(path: Path, records: Mapping[str, bytes]) -> Path:
    """Write an archive as torch does: aligned, uncompressed, with checksums that are right."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, record in records.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return path


def changed(text: bytes, old: bytes, new: bytes) -> bytes:
    """Replace an old text, which has to be there exactly once."""
    assert text.count(old) == 1, (old, text)
    return text.replace(old, new)


def view(count: bytes, offset: bytes = b"K\x00", size: bytes = b"K\x04") -> bytes:
    """Return another `FIRST_VIEW`, by the pickle operations that push its numbers."""
    return count + b"tq\x07Q" + offset + size + b"\x85"


def write_changed(path: Path, *changes: tuple[bytes, bytes], **others: Any) -> Path:
    """Write `content` with changes to its pickle."""
    records = records_of(content(**others))
    for old, new in changes:
        records["data.pkl"] = changed(records["data.pkl"], old, new)
    return write_records(path, records)
