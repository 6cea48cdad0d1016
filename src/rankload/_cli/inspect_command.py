"""``rankload inspect``: the tensors of a checkpoint, local or remote, without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from rankload._cli.app import AsJson, app, print_json, print_table, shown_size
from rankload._formats.entry import TensorEntry
from rankload._text import printable


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="A path or a URL.", metavar="CHECKPOINT")],
    diff: Annotated[str | None, typer.Option(help="Show how this checkpoint differs.", metavar="CHECKPOINT")] = None,
    depth: Annotated[int, typer.Option(help="Sum sizes up below so many parts of a name; 0 shows no sums.", min=0)] = 1,
    as_json: AsJson = False,
) -> None:
    """List the tensors of a checkpoint: names, dtypes, shapes and sizes, and sums by dtype and by prefix.

    Of a remote checkpoint only its index is read, usually less than 1 MB. With --diff, the exit status is 1 if names,
    dtypes or shapes differ.
    """
    from rankload._api.inspect import open_checkpoint

    with open_checkpoint(url) as checkpoint:
        entries, size_bytes = dict(checkpoint.entries), checkpoint.size_bytes
    if diff is not None:
        with open_checkpoint(diff) as other:
            differences = [*_differences(entries, other.entries)]
        print_json(differences) if as_json else print_table(differences, ("name", "first", "second"))
        raise typer.Exit(1 if differences else 0)
    sums = {"dtype": _sums((entry.dtype, entry) for entry in entries.values())}
    if depth:
        sums["prefix"] = _sums((".".join(name.split(".")[:depth]), entry) for name, entry in entries.items())
    if as_json:
        print_json({"size_bytes": size_bytes, "tensors": [_row(entry) for entry in entries.values()], "sums": sums})
        return
    print_table([_row(entry, is_text=True) for entry in entries.values()], ("name", "dtype", "shape", "size"))
    for by, found in sums.items():
        typer.echo(f"\nby {by}")
        rows = [
            {"": name, "tensors": one["tensors"], "size": shown_size(one["size_bytes"])} for name, one in found.items()
        ]
        print_table(rows, ("", "tensors", "size"))
    typer.echo(f"\n{len(entries)} tensors, {shown_size(size_bytes)}")


def _row(entry: TensorEntry, *, is_text: bool = False) -> dict[str, Any]:
    row = {"name": printable(entry.name), "dtype": entry.dtype}
    if is_text:
        return {**row, "shape": str(list(entry.shape)), "size": shown_size(entry.size_bytes)}
    place = {"file": entry.file, "offset": entry.offset, "storage": entry.storage_key}
    return {**row, "shape": list(entry.shape), "size_bytes": entry.size_bytes, **place}


def _sums(parts: Iterable[tuple[str, TensorEntry]]) -> dict[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, entry in parts:
        counts[name] += 1
        sizes[name] += entry.size_bytes
    return {printable(name): {"tensors": counts[name], "size_bytes": size} for name, size in sizes.most_common()}


def _differences(
    first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry]
) -> Iterable[dict[str, str | None]]:
    for name in {**first, **second}:
        found = [_shown_type(entries.get(name)) for entries in (first, second)]
        if found[0] != found[1]:
            yield {"name": printable(name), "first": found[0], "second": found[1]}


def _shown_type(entry: TensorEntry | None) -> str | None:
    return None if entry is None else f"{entry.dtype} {list(entry.shape)}"
