"""Named checkpoints: a TOML table says where a name's file is, what its digest is, and how it is adapted.

::

    [resnet50]
    url = "https://download.pytorch.org/models/resnet50-0676ba61.pth"    # or a list of mirrors, or a path
    licence = "BSD-3-Clause"
    adapt = ["unwrap", { strip_prefix = "module." }]
    sha256 = "…"        # this one and the next are filled in by `rankload lock`
    size = 102530333    # bytes, of all files together

    [llama.parts]       # digests of the files that an index names
    "model-00001-of-00002.safetensors" = "…"
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rankload import adapt as adapters_module
from rankload._cache.files import wrap_read_errors
from rankload._settings import TABLE_NAME, TABLE_VARIABLE
from rankload._text import printable
from rankload._types import is_sha256
from rankload._urls import expanded, scheme_of
from rankload.adapt import Adapter, as_adapter, compose
from rankload.errors import ArgumentError

#: Group of entry points with which a package registers its table: the value is the package that contains the file.
ENTRY_POINT_GROUP = "rankload.checkpoints"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_MAX_NAME_LENGTH = 255  # no file has a longer one (NAME_MAX, limits.h)
_KEYS = ("url", "sha256", "size", "parts", "licence", "adapt")

#: Adapters that a table can name: those that need nothing but text.
_ADAPTERS = ("unwrap", "strip_prefix", "add_prefix", "rename", "drop", "keep", "to_dtype")


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint in a table.

    Attributes:
        name: its name in the table.
        table: path of the table.
        urls: URL and mirrors.
        sha256: digest of the file, or of the index; None if the table has none.
        size_bytes: size of all files together; None if the table has none.
        part_digests: digests of the files that an index names.
        licence: licence of the weights, as the table gives it; None if it gives none.
        adapt: names and arguments of adapters, in order.
    """

    name: str
    table: Path
    urls: tuple[str, ...]
    sha256: str | None = None
    size_bytes: int | None = None
    part_digests: tuple[tuple[str, str], ...] = ()
    licence: str | None = None
    adapt: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def adapters(self) -> list[Adapter]:
        """Return the adapters.

        Raises:
            ArgumentError: one of them rejects its arguments.
        """
        made = []
        for name, arguments in self.adapt:
            try:
                made.append(getattr(adapters_module, name)(*arguments))
            except TypeError as error:  # too few arguments, or too many
                raise ArgumentError(f"{self.table}: [{self.name}]: adapt: {error}") from None
        return made


def adapter_for(named: NamedCheckpoint | None, given: Adapter | Sequence[Adapter] | None) -> Adapter:
    """Return one adapter: the table's adapters, and then those of the call.

    Raises:
        ArgumentError: one of them is none.
    """
    own = as_adapter(given)
    return own if named is None or not named.adapt else compose(*named.adapters(), own)


def find_checkpoint(url: object) -> NamedCheckpoint | None:
    """Return the checkpoint whose name was passed in place of a URL; None for a URL, a path, and an unknown name.

    An existing file of the name comes first. Then the table of ``RANKLOAD_TABLE``, or else of the working directory;
    then those of installed packages.

    Raises:
        ArgumentError: a table is malformed, or several packages have different checkpoints of that name.
    """
    if not isinstance(url, str) or not _NAME.fullmatch(url) or len(url) > _MAX_NAME_LENGTH or Path(url).is_file():
        return None
    own = _own_table()
    if own is not None and (found := read_table(own).get(url)) is not None:
        return found
    candidates = [table[url] for table in map(read_table, _registered_tables()) if url in table]
    if len({candidate.urls for candidate in candidates}) > 1:
        tables = " and ".join(str(candidate.table) for candidate in candidates)
        raise ArgumentError(f"{url!r}: {tables} have different checkpoints of this name; pass table= to choose one")
    return candidates[0] if candidates else None


def named_in(table: str | os.PathLike[str], name: str) -> NamedCheckpoint:
    """Return the checkpoint of a name in one table.

    Raises:
        ArgumentError: the table has no such name, or is malformed.
    """
    path = expanded(table).absolute()
    found = read_table(path)
    if name not in found:
        raise ArgumentError(f"{name!r} is not in {path}{_did_you_mean(name, found)}")
    return found[name]


def hint_on_name(url: str) -> str:
    """Return a hint for a path that does not exist, if it is like a name in a table; else an empty string."""
    if not _NAME.fullmatch(url):
        return ""
    own = _own_table()
    known = [name for path in ([own] if own else []) + list(_registered_tables()) for name in read_table(path)]
    return _did_you_mean(url, known) if get_close_matches(url, known) else ""


def read_table(path: Path) -> dict[str, NamedCheckpoint]:
    """Read a table.

    Raises:
        ArgumentError: it is malformed; the message names the row, the key, and what was expected.
        CacheError: it cannot be read.
    """
    import tomlkit  # slow to import
    from tomlkit.exceptions import TOMLKitError

    with wrap_read_errors(path):
        text = path.read_bytes()
    try:
        content = tomlkit.parse(text).unwrap()
    except (ValueError, TOMLKitError) as error:  # most errors of tomlkit are both
        raise ArgumentError(f"{path}: not TOML: {error}") from None
    rows = {name: row for name, row in content.items() if isinstance(row, dict)}
    if stray := [name for name in content if name not in rows]:
        raise ArgumentError(f"{path}: {printable(stray[0])} is outside a row; expected [name] above it")
    return {name: _row(name, row, path) for name, row in rows.items()}


def _row(name: str, row: Mapping[str, Any], table: Path) -> NamedCheckpoint:
    where = f"{table}: [{printable(name)}]"
    if not _NAME.fullmatch(name):
        raise ArgumentError(
            f"{where}: expected a name of letters, digits and _.+-, which begins with a letter or digit"
        )
    if unknown := [key for key in row if key not in _KEYS]:
        raise ArgumentError(f"{where}: unknown key {printable(unknown[0])}{_did_you_mean(unknown[0], _KEYS)}")
    urls = row.get("url")
    urls = [urls] if isinstance(urls, str) else urls
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) and url for url in urls):
        raise ArgumentError(f"{where}: url: expected a URL or a list of mirrors")
    parts, size = row.get("parts", {}), row.get("size")
    if not isinstance(parts, dict):
        raise ArgumentError(f"{where}: parts: expected a table of names and digests")
    for key, digest in [("sha256", row.get("sha256")), *((f"parts.{part}", parts[part]) for part in parts)]:
        if digest is not None and not (isinstance(digest, str) and is_sha256(digest)):
            raise ArgumentError(f"{where}: {printable(key)}: expected 64 lower-case hex digits")
    if size is not None and (type(size) is not int or size < 0):
        raise ArgumentError(f"{where}: size: expected a number of bytes")
    if not isinstance(adapt := row.get("adapt", []), list):
        raise ArgumentError(f"{where}: adapt: expected a list")
    if not isinstance(licence := row.get("licence"), (str, type(None))):
        raise ArgumentError(f"{where}: licence: expected text")
    return NamedCheckpoint(
        name=name,
        table=table,
        urls=tuple(_beside(table, url) for url in urls),
        sha256=row.get("sha256"),
        size_bytes=size,
        part_digests=tuple(parts.items()),
        licence=licence,
        adapt=tuple(_adapter(one, where) for one in adapt),
    )


def _adapter(given: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """Return name and arguments of one adapter: ``"unwrap"``, ``{ unwrap = "model" }``, ``{ rename = ["a", "b"] }``."""
    name, arguments = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (given, [])
    arguments = [arguments] if isinstance(arguments, str) else arguments
    is_known = isinstance(name, str) and name in _ADAPTERS
    if not is_known or not isinstance(arguments, list) or not all(isinstance(one, str) for one in arguments):
        raise ArgumentError(
            f"{where}: adapt: expected a list of names, or of {{ name = argument }}, of: {', '.join(_ADAPTERS)}"
        )
    return name, tuple(arguments)


def _own_table() -> Path | None:
    if given := os.environ.get(TABLE_VARIABLE):
        return expanded(given).absolute()
    path = Path(TABLE_NAME).absolute()
    return path if path.is_file() else None


def _registered_tables() -> Iterator[Path]:
    from importlib import metadata, resources  # slow to import

    for entry_point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP)):
        try:
            path = resources.files(entry_point.value) / TABLE_NAME
        except (ImportError, TypeError) as error:
            raise ArgumentError(f"entry point {entry_point.name} of {ENTRY_POINT_GROUP}: {error}") from None
        yield Path(str(path))


def _beside(table: Path, url: str) -> str:
    """Return a path relative to the table as an absolute one; a URL, and an absolute path, unchanged."""
    return url if scheme_of(url) else str(table.parent / expanded(url))


def _did_you_mean(name: str, known: Any) -> str:
    close = get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known are: {', '.join(map(printable, sorted(known)))}"
