"""Run the command line."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from rankload._cli import cache_commands, hash_command, inspect_command, lock, prefetch
from rankload._cli.app import app, in_shell_words
from rankload.errors import RankloadError

#: Modules whose commands the application has: importing them registers the commands.
COMMANDS = (prefetch, inspect_command, cache_commands, hash_command, lock)


@app.command(name="run", add_help_option=False, context_settings={"ignore_unknown_options": True})
def run_script(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[-m MODULE | SCRIPT] [ARGUMENT...]", help="As for python itself.")
    ],
) -> None:
    """Run a script or module whose downloads by torch.hub and huggingface_hub are once per job.

    With torchrun: torchrun --nproc-per-node 8 -m rankload run train.py --its-own-arguments
    """
    raise AssertionError("main() has run it")


def main() -> None:
    """Run the command line. A RankloadError becomes one line on stderr and exit status 1."""
    if sys.argv[1:2] == ["run"]:  # all that follows belongs to the script, and so does the set-up of logging
        from rankload._patch.run_script import run

        run(sys.argv[2:])
        return
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        app()
    except RankloadError as error:
        typer.echo(f"rankload: {in_shell_words(error)}", err=True)
        sys.exit(1)
