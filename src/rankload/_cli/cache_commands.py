"""``rankload ls``, ``verify``, ``rm`` and ``prune``: the cache directory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from rankload._cache.catalogue import CachedItem, leftovers, list_items, mapped_files, remove_file, remove_item
from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._cache.record import find_record
from rankload._cli.app import AsJson, app, print_json, print_table, shown_size
from rankload._fetch.file_digest import sha256_of_file
from rankload._fetch.partials.journal import partial_path_of
from rankload._fetch.partials.owner import owner_of
from rankload._settings import Settings
from rankload._text import printable
from rankload._urls import expanded

ModelDir = Annotated[
    Path | None,
    typer.Option(help="Cache directory.", show_default="RANKLOAD_MODEL_DIR, else torch.hub's checkpoints directory"),
]

_DAY_SECONDS = 24 * 3600.0

#: Age, in lease durations, after which a lease counts as left by a killed process.
_LEASES_UNTIL_ABANDONED = 10

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@app.command()
def ls(model_dir: ModelDir = None, as_json: AsJson = False) -> None:
    """List what rankload has published in the cache: size, age, origin, digest, who vouched for it, if it is in use.

    In use means: a process of this host has the file mapped, or a download holds its lease. Files that rankload has not
    published are not listed.
    """
    items, mapped, now = _items(model_dir), mapped_files(), time.time()
    rows = [_row(item, mapped, now) for item in items]
    if as_json:
        print_json(rows)
        return
    shown = [
        {
            "name": row["name"],
            "size": shown_size(row["size_bytes"]),
            "used": f"{row['days_unused']:.0f} d ago",
            "sha256": (row["sha256"] or "-")[:12],
            "vouched by": row["vouched_by"] or "nobody (structure only)",
            "in use": row["in_use"] or "-",
            "origin": row["origin"],
        }
        for row in rows
    ]
    print_table(shown, ("name", "size", "used", "sha256", "vouched by", "in use", "origin"))
    typer.echo(
        f"\n{_directory(model_dir)}: {_counted(len(rows))}, {shown_size(sum(row['size_bytes'] for row in rows))}"
    )
    if rests := [path for path in leftovers(_directory(model_dir)) if _is_of_the_dead(path)]:
        typer.echo(f"{_counted(len(rests))} in quarantine, or left by killed downloads: {shown_size(_size_of(rests))}")


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, as ls shows them.", metavar="[NAME]...", show_default="all")
    ] = None,
    model_dir: ModelDir = None,
) -> None:
    """Hash cached files again, and compare with what was verified when they were published.

    A file that differs is fetched again by the next call that needs it. The exit status is then 1.
    """
    has_failed = False
    for item in _named(_items(model_dir), names):
        for entry in item.entries:
            with wrap_read_errors(entry.path):
                found = find_record(entry.record_path)
                expected = found.record.sha256 if found and found.record else None
                digest = sha256_of_file(entry.path, lambda _: None)
            outcome = "no digest on record" if expected is None else "ok" if digest == expected else "DAMAGED"
            has_failed |= outcome == "DAMAGED"
            typer.echo(f"{outcome}: {_shown(entry.path)}")
    if has_failed:
        raise typer.Exit(1)


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Names, as ls shows them.", metavar="NAME...")],
    model_dir: ModelDir = None,
    force: Annotated[bool, typer.Option("--force", help="Also what is in use.")] = False,
) -> None:
    """Remove files from the cache. What is in use stays, and the exit status is then 1.

    A removed file is fetched again by the next call that needs it. Who has it mapped keeps it.
    """
    mapped, has_failed = mapped_files(), False
    for item in _named(_items(model_dir), names):
        if (why := _why_in_use(item, mapped)) and not force:
            typer.echo(f"rankload: {_shown(item.path)} is in use ({why}): it stays; --force removes it", err=True)
            has_failed = True
            continue
        _remove(item)
    if has_failed:
        raise typer.Exit(1)


@app.command()
def prune(
    model_dir: ModelDir = None,
    keep_latest: Annotated[
        int | None, typer.Option(help="Keep the N items that were used last.", metavar="N", min=0)
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Remove only what was not used for so many days.", metavar="DAYS", min=0)
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Remove the longest unused until so much is left, such as 500GB.", metavar="SIZE")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove. Without this option, only say what would be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what was not used for longest, and what killed downloads have left.

    At least one of --keep-latest, --older-than and --max-size is required. An item is removed if all given options say
    so. What is in use stays, and so does every file that rankload has not published. Quarantined files and partial
    files of dead processes go in any case.
    """
    if keep_latest is None and older_than is None and max_size is None:
        raise typer.BadParameter("say what to remove: --keep-latest, --older-than or --max-size")
    limit = None if max_size is None else _bytes_of(max_size)
    directory, items, mapped, now = _directory(model_dir), _items(model_dir), mapped_files(), time.time()
    chosen = [item for item in _chosen(items, keep_latest, older_than, limit, now) if not _why_in_use(item, mapped)]
    rests = [path for path in leftovers(directory) if _is_of_the_dead(path)]
    rests_bytes = _size_of(rests)
    if yes:
        for item in chosen:
            _remove(item, is_quiet=as_json)
        for path in rests:
            with wrap_write_errors(path):
                remove_file(path, directory)
    elif not as_json:
        for item in chosen:
            typer.echo(f"would remove {_shown(item.path)} ({shown_size(item.size_bytes)})")
        for path in rests:
            typer.echo(f"would remove {_shown(path)} ({shown_size(_size_of([path]))})")
    freed = sum(item.size_bytes for item in chosen) + rests_bytes
    if as_json:
        print_json(
            {
                "removed": yes,
                "paths": [str(path) for path in (*(item.path for item in chosen), *rests)],
                "size_bytes": freed,
            }
        )
    else:
        count = _counted(len(chosen) + len(rests))
        typer.echo(f"{count}, {shown_size(freed)}" + ("" if yes else "; --yes removes them"))


def _chosen(
    items: list[CachedItem], keep_latest: int | None, older_than: float | None, limit: int | None, now: float
) -> list[CachedItem]:
    """Return the items to remove, the longest unused first."""
    latest_first = sorted(items, key=lambda item: -item.used_at)
    total, chosen = sum(item.size_bytes for item in items), []
    for position in reversed(range(len(latest_first))):
        item = latest_first[position]
        is_kept = keep_latest is not None and position < keep_latest
        is_young = older_than is not None and now - item.used_at < older_than * _DAY_SECONDS
        if is_kept or is_young or (limit is not None and total <= limit):
            continue
        chosen.append(item)
        total -= item.size_bytes
    return chosen


def _is_of_the_dead(path: Path) -> bool:
    """Return whether nobody writes to a quarantined file, a partial file, or its journal any more."""
    owner = owner_of(partial_path_of(path) or path)
    return owner is None or owner.is_dead


def _size_of(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):
            total += path.lstat().st_size
    return total


def _counted(count: int) -> str:
    return f"{count} item" + ("" if count == 1 else "s")


def _directory(model_dir: Path | None) -> Path:
    from rankload._fetch.request import default_directory  # slow to import

    return default_directory() if model_dir is None else expanded(model_dir).absolute()


def _items(model_dir: Path | None) -> list[CachedItem]:
    directory = _directory(model_dir)
    if model_dir is not None and not directory.is_dir():
        typer.echo(f"rankload: {directory} is no directory: nothing is cached there", err=True)
    with wrap_read_errors(directory):
        return list(list_items(directory))


def _named(items: Iterable[CachedItem], names: list[str] | None) -> list[CachedItem]:
    found = [item for item in items if not names or item.name in names or str(item.path) in names]
    known = {name for item in found for name in (item.name, str(item.path))}
    if missing := [name for name in names or [] if name not in known]:
        raise typer.BadParameter(f"not in the cache: {', '.join(missing)}; rankload ls lists what is")
    return found


def _why_in_use(item: CachedItem, mapped: frozenset[tuple[int, int]]) -> str:
    """Return why an item should stay: ``mapped``, ``leased``, or an empty text."""
    if item.identities & mapped:
        return "mapped"
    oldest = time.time() - _LEASES_UNTIL_ABANDONED * Settings.from_environment().lease_seconds
    for entry in item.entries:
        with suppress(OSError):
            if entry.lease_path.lstat().st_mtime > oldest:
                return "leased"
    return ""


def _row(item: CachedItem, mapped: frozenset[tuple[int, int]], now: float) -> dict[str, Any]:
    return {
        "name": item.name,
        "path": str(item.path),
        "size_bytes": item.size_bytes,
        "days_unused": max(0.0, now - item.used_at) / _DAY_SECONDS,
        "origin": item.record.url,
        "sha256": item.record.sha256,
        "vouched_by": item.record.vouched_by,
        "source": item.record.source,
        "files": len(item.entries),
        "in_use": _why_in_use(item, mapped),
    }


def _remove(item: CachedItem, *, is_quiet: bool = False) -> None:
    with wrap_write_errors(item.path):
        size_bytes = remove_item(item)
    if not is_quiet:
        typer.echo(f"removed {_shown(item.path)} ({shown_size(size_bytes)})")


def _shown(path: Path) -> str:
    """Return a path for a terminal: a file in a shared directory may have any name."""
    return printable(str(path))


def _bytes_of(size: str) -> int:
    number = size.strip().upper().rstrip("KMGTB")
    unit = size.strip().upper()[len(number) :]
    try:
        return int(float(number) * _UNITS[unit if unit.endswith("B") or not unit else f"{unit}B"])
    except (ValueError, KeyError):
        raise typer.BadParameter(
            f"{size}: expected a number and B, KB, MB, GB or TB", param_hint="--max-size"
        ) from None
