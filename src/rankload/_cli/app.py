"""``rankload``: the commands, put together."""

from __future__ import annotations

import logging
import sys

import typer

from rankload._cli.prefetch import prefetch
from rankload._errors import RankloadError
from rankload._version import __version__

app = typer.Typer(
    name="rankload",
    help="A checkpoint from a URL into every rank of a distributed PyTorch job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback with local variables would show headers and signed URLs
)
app.command()(prefetch)


@app.callback(invoke_without_command=True)
def common(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    """See the help of each command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Errors of ours are one line on stderr and exit status 1."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        app()
    except RankloadError as error:
        typer.echo(f"rankload: {error}", err=True)
        sys.exit(1)
