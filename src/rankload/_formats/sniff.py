"""Detect a file's format, and whether the file is complete, from its first and last bytes and its headers.

The name does not count: a safetensors file may be called ``model.pth``, and a web page very often is.
"""

from __future__ import annotations

import codecs
import io
import os
from typing import Literal

from rankload._formats import safetensors, sharded
from rankload._formats import torch_legacy as legacy
from rankload._formats import torch_tar as legacy_tar
from rankload._formats import zip_archive as torch_zip
from rankload._formats.broken import BrokenFileError
from rankload._formats.source import LocalSource, Source, open_regular
from rankload.errors import NotACheckpointError

Format = Literal[
    "torch_zip",  # torch.save since 1.6
    "torchscript",  # torch.jit.save
    "single_member_zip",  # torch.hub's legacy zip: one checkpoint, compressed
    "zip",  # any other zip archive
    "legacy",  # torch.save before 1.6
    "legacy_tar",  # torch.save before 0.2
    "tar",  # any other tar archive
    "safetensors",
    "sharded",  # Hugging Face's index of several files
    "pickle",  # not torch.save's
    "html",
    "text",
    "empty",
    "unknown",
]

CHECKPOINT_FORMATS: frozenset[Format] = frozenset(
    {"torch_zip", "torchscript", "single_member_zip", "legacy", "legacy_tar", "safetensors", "sharded"}
)

_HEAD_BYTES = 1024
_SNIPPET_CHARACTERS = 60

#: Other kinds of files that turn up in place of a checkpoint, by their first bytes.
_STRANGERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    (b"\x1f\x8b", "gzip-compressed content"),
    (b"BZh", "bzip2-compressed content"),
    (b"\xfd7zXZ\0", "xz-compressed content"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed content"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"GGUF", "a GGUF file"),
)


def sniff(path: str | os.PathLike[str]) -> Format:
    """Return a file's format, by content. A zip archive whose directory is broken is a ``"zip"``."""
    with open_regular(path) as file:
        return _Sniffed(file).format


def format_of(source: Source) -> Format:
    """Return the format of an open file by its first bytes, and by its directory if it is a zip archive."""
    claimed = _claimed_format(source.read(_HEAD_BYTES, 0))
    return torch_zip.read_directory(source).kind if claimed == "zip" else claimed


def check_structure(path: str | os.PathLike[str], *, must_be_checkpoint: bool, origin: str) -> Format:
    """Check a file's headers and lengths, and return its format.

    The tensors themselves are not read; the check takes a few milliseconds for 1000 tensors. A truncated file is
    always refused.

    Args:
        path: path of the file.
        must_be_checkpoint: refuse every format that torch.load or rankload cannot load. Otherwise any file passes that
            is not empty and follows the format of its first bytes.
        origin: source of the file, for the message; no secrets.

    Raises:
        NotACheckpointError: the file is empty, broken, or (with must_be_checkpoint) something else.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        sniffed = _Sniffed(file)
        try:
            sniffed.check_lengths()
            if sniffed.format != "empty" and (not must_be_checkpoint or sniffed.is_checkpoint):
                return sniffed.format
            got = sniffed.name
        except BrokenFileError as error:
            got = str(error)
        size_bytes = sniffed.size_bytes
    raise NotACheckpointError(
        f"{origin}: expected a checkpoint, got {got} (file {path}, {size_bytes} bytes)",
        path=str(path),
        origin=origin,
        got=got,
        size_bytes=size_bytes,
    )


def describe(path: str | os.PathLike[str]) -> str:
    """Return a description of a file for messages: ``"text that begins '<html>…'"``."""
    with open_regular(path) as file:
        return _Sniffed(file).name


class _Sniffed:
    """An open file with its detected format; each header is read once.

    Attributes:
        size_bytes: length of the file.
        head: first bytes of the file.
        format: detected format.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._source = file, LocalSource(file.fileno())
        self._directory: torch_zip.Directory | None = None
        self._broken: BrokenFileError | None = None
        self.size_bytes = self._source.size_bytes
        self.head = self._source.read(_HEAD_BYTES, 0)
        self.format = _claimed_format(self.head)
        if self.format == "zip":
            try:
                self._directory = torch_zip.read_directory(self._source)
                self.format = self._directory.kind
            except BrokenFileError as error:
                self._broken = error
        elif self.format == "tar" and legacy_tar.is_legacy_tar(file):
            self.format = "legacy_tar"
        elif self.format == "text" and sharded.has_weight_map(self._source):
            self.format = "sharded"

    @property
    def is_checkpoint(self) -> bool:
        """Whether the format is a checkpoint's. The only member of an archive must be a checkpoint, too."""
        return self.format in CHECKPOINT_FORMATS and self._stranger_inside is None

    @property
    def name(self) -> str:
        """Description of the file, for messages."""
        return self._stranger_inside or (str(self._broken) if self._broken else _name(self.format, self.head))

    def check_lengths(self) -> None:
        """Compare the file's headers and lengths with each other, as far as the format has any.

        Raises:
            BrokenFileError: the file is truncated or damaged.
        """
        if self._broken:
            raise self._broken
        match self.format:
            case "torch_zip" | "torchscript" | "single_member_zip" | "zip":
                assert self._directory is not None
                torch_zip.payload_offsets(self._source, self._directory)
            case "safetensors":
                safetensors.read_header(self._source)
            case "sharded":
                sharded.part_names(self._source)
            case "legacy":
                legacy.check_length(self._source)
            case "legacy_tar":
                legacy_tar.check_length(self._file, self.size_bytes)

    @property
    def _stranger_inside(self) -> str | None:
        """Description of an archive whose only member does not begin like a checkpoint; else None."""
        if self.format != "single_member_zip" or self._directory is None:
            return None
        (member,) = self._directory.members
        head = torch_zip.member_head(self._source, self._directory, member, _HEAD_BYTES)
        claimed = _claimed_format(head)
        if claimed in ("zip", "legacy", "safetensors", "tar"):
            return None
        return f"a zip archive of one file, {member.name!r}, with {_name(claimed, head)}"


def _claimed_format(head: bytes) -> Format:
    """Return the format that a file's first bytes claim. They do not show the kind of a zip or tar archive."""
    if not head:
        return "empty"
    if head.startswith((torch_zip.LOCAL_SIGNATURE, torch_zip.END_SIGNATURE)):
        return "zip"
    if legacy.claims_to_be_legacy(head):
        return "legacy"
    if safetensors.claims_to_be_safetensors(head):
        return "safetensors"
    if legacy_tar.claims_to_be_tar(head):
        return "tar"
    if head[0] == 0x80 and 1 <= int.from_bytes(head[1:2], "little") <= 5:
        return "pickle"
    text = _text(head)
    if text is None:
        return "unknown"
    return "html" if text.lstrip("\ufeff \t\r\n").startswith("<") else "text"


def _name(file_format: Format, head: bytes) -> str:
    for first_bytes, name in _STRANGERS:
        if head.startswith(first_bytes):
            return name
    text = _text(head)
    match file_format:
        case "empty":
            return "an empty file"
        case "html" | "text" if text is not None:
            return f"text that begins {_snippet(text)!r}"
        case "torch_zip":
            return "a checkpoint of torch's zip format"
        case "torchscript":
            return "a TorchScript archive"
        case "legacy":
            return "a checkpoint of torch's legacy format"
        case "legacy_tar":
            return "a checkpoint of torch's tar format"
        case "single_member_zip":
            return "a zip archive of one file"
        case "safetensors":
            return "a safetensors file"
        case "sharded":
            return "the index of a checkpoint in several files"
        case "pickle":
            return "a plain pickle, not written by torch.save"
        case "zip":
            return "a zip archive that torch.save did not write"
        case "tar":
            return "a tar archive that torch.save did not write"
        case _:
            return f"a file that begins with the bytes {head[:8].hex(' ')}"


def _text(head: bytes) -> str | None:
    """Decode the beginning of a text file; None if it is not text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    return text if all(character.isprintable() or character in "\ufeff\t\r\n\f" for character in text) else None


def _snippet(text: str) -> str:
    text = " ".join(text.replace("\ufeff", "").split())
    return text if len(text) <= _SNIPPET_CHARACTERS else text[: _SNIPPET_CHARACTERS - 1] + "…"
