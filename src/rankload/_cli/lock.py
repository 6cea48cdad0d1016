"""``rankload lock``: fill in the digests and sizes of a table of named checkpoints."""

from __future__ import annotations

import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankload._cache.files import wrap_write_errors
from rankload._cli.app import app, in_shell_words
from rankload._settings import TABLE_NAME
from rankload.errors import ArgumentError, RankloadError

if TYPE_CHECKING:
    from rankload._fetch.checkpoint_table import NamedCheckpoint


@dataclass(frozen=True)
class _Locked:
    """What a checkpoint is now.

    Attributes:
        sha256: digest of the file, or of the index.
        size: size of all files together, in bytes.
        parts: digests of the files that an index names.
    """

    sha256: str
    size: int
    parts: dict[str, str]


@app.command()
def lock(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of checkpoints; default: all.", metavar="NAME...")
    ] = None,
    table: Annotated[Path, typer.Option(help="The table.")] = Path(TABLE_NAME),
    update: Annotated[
        bool, typer.Option("--update", help="Take what the origins have now, and replace digests that differ.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a digest or size is missing.")] = False,
    model_dir: Annotated[Path | None, typer.Option(help="Cache directory, as for prefetch.")] = None,
) -> None:
    """Fetch the checkpoints of a table, and write their SHA-256 and sizes into it. Comments and order stay.

    A checkpoint that has a digest is verified by it. If its origin has another file now, or a checkpoint cannot be
    fetched, the others are still locked, and the exit status is 1.
    """
    from rankload._fetch.checkpoint_table import read_table  # slow to import

    rows = read_table(table.absolute())
    if unknown := set(names or ()) - rows.keys():
        raise ArgumentError(f"{sorted(unknown)[0]!r} is not in {table}; it has {', '.join(sorted(rows))}")
    found: dict[str, _Locked] = {}
    has_failed = False
    for name in names or rows:
        try:
            found[name] = _fetched(rows[name], model_dir, update=update)
        except RankloadError as error:
            typer.echo(f"rankload: {name}: {in_shell_words(error)}", err=True)
            has_failed = True
            continue
        change = _change(rows[name], found[name])
        has_failed = has_failed or bool(check and change)
        typer.echo(f"{name}: {change or 'unchanged'}")
    if not check:
        _write(table, found)
    if has_failed:
        raise typer.Exit(1)


def _fetched(row: NamedCheckpoint, model_dir: Path | None, *, update: bool) -> _Locked:
    """Fetch a checkpoint, and return what it is."""
    from rankload._api.fetch import fetch_in_this_process
    from rankload._fetch.file_digest import sha256_of_file
    from rankload._fetch.index_files import files_of

    wanted = replace(row, sha256=None, part_digests=()) if update else row
    is_remote = not Path(row.urls[0]).is_absolute()
    file = fetch_in_this_process(wanted, model_dir, must_be_checkpoint=False, refresh=update and is_remote)
    (path, size_bytes), *parts = files_of(file)
    return _Locked(
        file.sha256 or sha256_of_file(path, lambda _: None),
        size_bytes + sum(size for _, size in parts),
        {part.name: sha256_of_file(part, lambda _: None) for part, _ in parts},
    )


def _change(row: NamedCheckpoint, now: _Locked) -> str:
    """Return what the table lacks, or has another value for; empty if nothing."""
    before = {"sha256": row.sha256, "size": row.size_bytes, "parts": dict(row.part_digests)}
    after = {"sha256": now.sha256, "size": now.size, "parts": now.parts}
    added = [key for key in after if not before[key] and after[key]]
    changed = [key for key in after if before[key] and before[key] != after[key]]
    return "; ".join(f"{what} {', '.join(keys)}" for what, keys in (("new", added), ("changed", changed)) if keys)


def _write(table: Path, found: dict[str, _Locked]) -> None:
    """Write digests and sizes into the table, in one step."""
    import tomlkit

    content = tomlkit.parse(table.read_bytes())
    before = content.as_string()
    for name, now in found.items():
        row: Any = content[name]
        row["sha256"], row["size"] = now.sha256, now.size
        if now.parts:
            row["parts"] = now.parts
        else:
            row.pop("parts", None)
    if content.as_string() == before:
        return
    path = table.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with wrap_write_errors(path):
        try:
            temporary.write_text(content.as_string(), encoding="utf-8")
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()
