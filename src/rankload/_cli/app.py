"""The application that all commands belong to, and what they share."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from rankload._text import printable
from rankload._version import __version__

app = typer.Typer(
    name="rankload",
    help="Load a checkpoint from a URL into every rank of a distributed PyTorch job.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback with local variables would show headers and signed URLs
)

#: Arguments of the Python calls that commands have as options.
_OPTIONS = {
    "check_hash": "--check-hash",
    "file_name": "--file-name",
    "headers": "--header",
    "max_bytes": "--max-bytes",
    "model_dir": "--model-dir",
    "refresh": "--refresh",
    "sha256": "--sha256",
    "sidecar": "--sidecar",
    "verify": "--verify",
}

#: An argument, with a flag's value, or the beginning of another value.
_ARGUMENT = re.compile(rf"\b({'|'.join(_OPTIONS)})=(?:True\b|(?=([\w'\"{{\[]))|)")

#: Print JSON instead of text.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def common(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    """Load checkpoints into distributed PyTorch jobs. Each command has its own --help."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def in_shell_words(error: Exception) -> str:
    """Return an error's message with options in place of Python's arguments: ``--check-hash``, not check_hash=True."""
    text = _ARGUMENT.sub(lambda match: _OPTIONS[match[1]] + (" " if match[2] else ""), str(error))
    return text.replace("dist_fetch", "rankload prefetch")


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))


def shown_size(size_bytes: int) -> str:
    """Return a size with its unit, in powers of 1000: ``"1.16 GB"``."""
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def print_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Print rows below one another, in columns as wide as their longest text. The texts may be another user's."""
    texts = [
        columns,
        *(tuple("-" if row[name] is None else printable(str(row[name])) for name in columns) for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
