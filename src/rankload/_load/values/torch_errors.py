"""Translate torch's errors into LoadErrors."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from rankload._formats.broken import BrokenFileError
from rankload._formats.sniff import describe
from rankload._text import MAX_SHOWN_NAME_LENGTH, printable
from rankload.errors import DeviceError, LoadError, MissingFileError, RankloadError, UnsafePickleError

_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global")
_ABSENT_DEVICE = re.compile(r"Attempting to deserialize object on [^.]*(?:\.[^. ][^.]*)*\.")
_REFUSED_FORMAT = "Cannot use ``weights_only=True``"
_MAX_SHOWN_NAMES = 20
_INDENT = "    "
_TRUST = "Pass weights_only=False only if you trust where the file comes from: it can then run any code."


@contextlib.contextmanager
def wrap_load_errors(path: Path, display_name: str | None = None, opened: IO[bytes] | None = None) -> Iterator[None]:
    """Translate errors inside the context into LoadError or UnsafePickleError; torch's own error is the cause.

    A file that does not exist becomes MissingFileError, and a device that does not exist DeviceError.

    Args:
        path: path of the file.
        display_name: name of the file in messages; default: its path.
        opened: the file object, if the file has no path.
    """
    position = _position(opened)
    try:
        yield
    except RankloadError:
        raise
    except FileNotFoundError as error:
        missing = error.filename or path  # the missing file may be a part of the checkpoint
        raise MissingFileError(
            f"cannot read {printable(str(missing))}: no such file", path=str(missing), errno=error.errno
        ) from error
    except Exception as error:
        error.args = tuple(_plain(argument) for argument in error.args)
        file: Path | IO[bytes] = path
        if opened is not None and position is not None:
            opened.seek(position)
            file = opened
        raise _translate(error, path, printable(display_name or str(path)), file) from error


def _position(opened: IO[bytes] | None) -> int | None:
    try:
        return None if opened is None else opened.tell()
    except (AttributeError, OSError):  # the file object cannot seek
        return None


def _translate(error: Exception, path: Path, display_name: str, file: Path | IO[bytes]) -> RankloadError:
    text = str(error) or type(error).__name__
    facts = {"path": display_name, "size_bytes": _size_bytes(path)}
    if isinstance(error, BrokenFileError):
        return LoadError(f"{display_name}: {text}", **facts)
    if refused := _REFUSED_GLOBAL.search(text):
        names = ", ".join(_refused_names(file, refused[1]))
        return UnsafePickleError(
            f"{display_name}: weights_only=True refused the file, which wants to use {names}. If that is harmless, "
            f"allow it with torch.serialization.add_safe_globals([{names}]). {_TRUST}",
            **facts,
            refused=names,
        )
    if absent := _ABSENT_DEVICE.search(text):
        return DeviceError(
            f"{display_name}: its tensors should go to a device that this process does not have: {absent[0]} "
            'Pass another map_location, such as "cpu" or "{device}"',
            **facts,
        )
    if _REFUSED_FORMAT in text:
        return UnsafePickleError(f"{display_name}: weights_only=True cannot load {_describe(path)}. {_TRUST}", **facts)
    if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in text:
        return UnsafePickleError(
            f"{display_name}: weights_only=True refused the file: {_core(text)}. {_TRUST}", **facts
        )
    if isinstance(error, MemoryError):
        return LoadError(f"{display_name}: not enough memory to load {facts['size_bytes']} bytes ({text})", **facts)
    what = _describe(path) + ("" if facts["size_bytes"] is None else f" of {facts['size_bytes']} bytes")
    return LoadError(f"{display_name}: torch could not load {what}: {type(error).__name__}: {text}", **facts)


def _refused_names(file: Path | IO[bytes], first: str) -> list[str]:
    """Return all classes and functions that weights_only refuses in a file. torch's error names only the first."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # torch's function supports only one format, and only files that it can open
        names = []
    names = [printable(name) for name in sorted({first, *names}) if len(name) <= MAX_SHOWN_NAME_LENGTH]
    more = len(names) - _MAX_SHOWN_NAMES
    return names if more <= 0 else [*names[:_MAX_SHOWN_NAMES], f"and {more} more"]


def _plain(argument: object) -> object:
    """Return a text of torch's in a form that is safe to show.

    Escape sequences for bold type are removed. Other unprintable characters, which torch quotes from the file, are
    escaped. Lines after the first are indented: torch does not escape line breaks in names, and no line may look like
    another entry of a log.
    """
    if not isinstance(argument, str):
        return argument
    return "\n".join(
        (_INDENT if number and not line[:1].isspace() else "") + printable(line.replace("\t", _INDENT))
        for number, line in enumerate(_ESCAPE_SEQUENCE.sub("", argument).split("\n"))
    )


def _core(text: str) -> str:
    """Return the unpickler's own sentence, without torch's advice before and after it."""
    text = text.partition("Check the documentation of torch.load")[0]
    return text.rpartition("WeightsUnpickler error:")[2].strip().splitlines()[-1].rstrip(".") if text.strip() else ""


def _describe(path: Path) -> str:
    try:
        return describe(path)
    except (OSError, BrokenFileError):
        return "the file"


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
