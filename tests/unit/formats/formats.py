"""Writers of one small real file of every format."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

CONTENT = {"weight": torch.arange(6, dtype=torch.float32).view(2, 3), "steps": torch.tensor(7)}

Write = Callable[[Path], None]


def write_zip(path: Path) -> None:
    torch.save(CONTENT, path)


def write_legacy(path: Path) -> None:
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)


def write_legacy_protocol_1(path: Path) -> None:
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False, pickle_protocol=1)


def write_legacy_protocol_4(path: Path) -> None:
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False, pickle_protocol=4)


def write_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the format lives on in files
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 1), torch.zeros(1, 2)), path)


def write_safetensors(path: Path) -> None:
    save_file(CONTENT, path)


def write_packed(path: Path) -> None:
    _pack(path, write_legacy, zipfile.ZIP_DEFLATED)


def write_packed_zip(path: Path) -> None:
    """An archive that holds, uncompressed, another whole archive."""
    _pack(path, write_zip, zipfile.ZIP_STORED)


def write_tar(path: Path) -> None:
    """torch 0.1's format, which no torch of today writes; see torch.serialization._legacy_load."""
    tensor = CONTENT["weight"]
    storages = path.with_name("storages")
    with storages.open("wb") as file:
        pickle.dump(1, file, 2)
        pickle.dump((1, "cpu", torch.FloatStorage), file, 2)
        file.flush()
        tensor.untyped_storage()._write_file(file, True, True, tensor.element_size())
    with storages.open("ab") as file:
        pickle.dump([], file, 2)
    tensors = io.BytesIO()
    pickle.dump(1, tensors, 2)
    pickle.dump((2, 1, torch.FloatTensor), tensors, 2)
    tensors.write(struct.pack("<i4x2q2qq", tensor.dim(), *tensor.shape, *tensor.stride(), 0))
    objects = io.BytesIO()
    pickler = _TensorByKey(objects, 2)
    pickler.dump({"weight": tensor})
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (
            ("pickle", objects.getvalue()),
            ("tensors", tensors.getvalue()),
            ("storages", storages.read_bytes()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    storages.unlink()


class _TensorByKey(pickle.Pickler):
    def persistent_id(self, obj: object) -> int | None:
        return 2 if isinstance(obj, torch.Tensor) else None


def _pack(path: Path, write: Write, compression: int) -> None:
    inner = path.with_name("inner")
    write(inner)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.write(inner, "model.pth")
    inner.unlink()


WRITERS: dict[str, tuple[str, Write]] = {
    "zip": ("torch_zip", write_zip),
    "legacy": ("legacy", write_legacy),
    "legacy-protocol-1": ("legacy", write_legacy_protocol_1),
    "legacy-protocol-4": ("legacy", write_legacy_protocol_4),
    "torchscript": ("torchscript", write_torchscript),
    "packed": ("single_member_zip", write_packed),
    "packed-zip": ("single_member_zip", write_packed_zip),
    "tar": ("legacy_tar", write_tar),
    "safetensors": ("safetensors", write_safetensors),
}

#: Those that weights_only loads.
WEIGHTS = {name: WRITERS[name][1] for name in ("zip", "legacy", "packed", "packed-zip", "safetensors")}
