"""The index of files that were mutated at random: an index or one of two errors, quickly, with nothing executed.

What is loaded by such an index alone is compared with what torch.load makes of the file.

PYTHONPATH=tests:src python -m soak.parsers --runs 1000 --seed 1      # a million files
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import random
import resource
import struct
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from rankload._formats.broken import BrokenFileError
from rankload._formats.pickle_values import NotUnderstoodError
from rankload._formats.read_index import read_index
from soak.runs import start

FILES_PER_RUN = 1000
MAX_SECONDS = 20.0
MEMORY_BYTES = 1 << 30

#: Nothing of that kind happens while a file is parsed.
_EVENTS = frozenset(
    {"os.system", "subprocess.Popen", "exec", "compile", "open", "socket.connect", "os.exec", "ctypes.dlopen"}
)
_seen: list[str] = []
_is_watching = False

INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\xff" * 8,
    b"(",
    b"0",
    b"t",
    b"R",
    b"u",
    b"Q",
    b".",
)


class BytesSource:
    """See `rankload._formats.source.Source`."""

    def __init__(self, content: bytes) -> None:
        self._content, self.size_bytes = content, len(content)

    def read(self, length: int, offset: int) -> bytes:
        return self._content[offset : offset + length]


def run(source: random.Random, directory: Path) -> tuple[str, str]:
    """A thousand files: of each an index whose tensors lie in it, or BrokenFileError or NotUnderstoodError."""
    _watch()
    outcomes: Counter[str] = Counter()
    with _limited_memory():
        for _ in range(FILES_PER_RUN):
            name, content = source.choice(_MAKERS)(source)
            outcomes[_parse(name, content, directory)] += 1
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())), "fine"


def _parse(name: str, content: bytes, directory: Path) -> str:
    global _is_watching  # noqa: PLW0603 - an audit hook cannot be taken back
    began_at = time.monotonic()
    outcome = "index"
    try:
        _is_watching = True
        index = read_index(BytesSource(content), name, _no_parts, is_remote=False)
    except (BrokenFileError, NotUnderstoodError) as error:
        outcome = type(error).__name__
    except BaseException:
        _is_watching = False
        (directory / name).write_bytes(content)
        raise
    else:
        for entry in index.tensors.values():
            assert 0 <= entry.offset <= entry.offset + entry.length <= len(content), f"{entry.name} is not in the file"
    finally:
        _is_watching = False
    seconds = time.monotonic() - began_at
    if _seen or seconds > MAX_SECONDS:
        (directory / name).write_bytes(content)
        events = [*_seen]
        _seen.clear()
        raise AssertionError(f"{seconds:.0f} s, and {events}")
    return outcome


def _no_parts(name: str) -> Any:
    raise BrokenFileError("there are no others")


def _watch() -> None:
    if not _HOOKED:
        for codec in ("cp437", "raw-unicode-escape", "unicode-escape", "latin1"):  # imported when they are first used
            codecs.lookup(codec)
        sys.addaudithook(lambda event, _: _seen.append(event) if _is_watching and event in _EVENTS else None)
        _HOOKED.append(True)


_HOOKED: list[bool] = []


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutated(source: random.Random, content: bytes) -> bytes:
    """A few bytes changed, dropped, inserted, doubled; lengths and operations rather than any."""
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        at, length = source.randrange(len(changed) + 1), source.choice((1, 1, 2, 4, 8, 40))
        match source.randrange(6):
            case 0:
                changed[at : at + length] = source.randbytes(length)
            case 1:
                changed[at : at + length] = source.choice(INTERESTING)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = source.choice(INTERESTING)
            case 4:
                begin = source.randrange(len(changed) + 1)
                changed[at:at] = changed[begin : begin + length]
            case _:
                if at < len(changed):
                    changed[at] ^= 1 << source.randrange(8)
    return bytes(changed)


def _content(protocol: int, *, is_zip: bool) -> bytes:
    weights = OrderedDict(a=torch.ones(3, 4), b=torch.arange(5), p=torch.nn.Parameter(torch.ones(2)))
    content = {"model": weights, "tied": weights["a"].t(), "epoch": 3, "betas": (0.9, 0.99), "size": torch.Size([1])}
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def _state_dict() -> bytes:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(3, 4))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getvalue()


_ZIPS = [*(_content(protocol, is_zip=True) for protocol in (2, 4)), _state_dict()]
_LEGACY = [_content(protocol, is_zip=False) for protocol in (2, 4)]
_SAFETENSORS = save_safetensors({"a": torch.ones(3, 4), "b": torch.arange(5)}, {"format": "pt"})
_SHARDED = json.dumps({"weight_map": {"a": "one", "b": "two"}}).encode()


def _zip(source: random.Random) -> tuple[str, bytes]:
    return "file.pth", mutated(source, source.choice(_ZIPS))


def _zip_with_another_pickle(source: random.Random) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source.choice(_ZIPS))) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(member.filename, mutated(source, content) if member.filename.endswith(".pkl") else content)
    return "file.pth", buffer.getvalue()


def _mapped_zip_with_another_pickle(source: random.Random) -> tuple[str, bytes]:
    """Written by torch, so that its tensors lie where they can be mapped."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    with zipfile.ZipFile(io.BytesIO(source.choice(_ZIPS))) as old:
        for member in old.infolist():
            name, content = member.filename.partition("/")[2], old.read(member)
            if name == "data.pkl" or name.startswith("data/"):
                content = mutated(source, content) if name == "data.pkl" else content
                writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return "file.pth", buffer.getvalue()


def _legacy(source: random.Random) -> tuple[str, bytes]:
    return "file.pth", mutated(source, source.choice(_LEGACY))


def _safetensors(source: random.Random) -> tuple[str, bytes]:
    return "file.safetensors", mutated(source, _SAFETENSORS)


def _safetensors_with_another_header(source: random.Random) -> tuple[str, bytes]:
    (length,) = struct.unpack_from("<Q", _SAFETENSORS)
    header = mutated(source, _SAFETENSORS[8 : 8 + length])
    return "file.safetensors", struct.pack("<Q", len(header)) + header + _SAFETENSORS[8 + length :]


def _sharded(source: random.Random) -> tuple[str, bytes]:
    return "model.safetensors.index.json", mutated(source, _SHARDED)


_MAKERS: list[Callable[[random.Random], tuple[str, bytes]]] = [
    _zip,
    _zip_with_another_pickle,
    _mapped_zip_with_another_pickle,
    _legacy,
    _legacy,
    _safetensors,
    _safetensors_with_another_header,
    _sharded,
]

if __name__ == "__main__":
    start("parsers", run)
