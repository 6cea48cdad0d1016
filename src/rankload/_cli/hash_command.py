"""``rankload hash``: digests of files, and names that carry them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from rankload._cache.files import wrap_read_errors, wrap_write_errors
from rankload._cli.app import AsJson, app, in_shell_words, print_json
from rankload._fetch.file_digest import sha256_of_file
from rankload._platform.linux import rename_if_absent
from rankload.errors import RankloadError

#: Digits of the digest in a name, as torch.hub's names have them.
_DIGITS = 8

#: A digest that the name carries already.
_OLD_DIGEST = re.compile(r"-[0-9a-f]{8,64}$")


@app.command(name="hash")
def hash_files(
    files: Annotated[list[Path], typer.Argument(help="Files.", metavar="FILE...")],
    rename: Annotated[
        bool, typer.Option("--rename", help="Rename each file to torch.hub's NAME-<first 8 digits>.EXTENSION.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the SHA-256 of files as sha256sum does, or give them names that carry it.

    Users of such a name check it with check_hash=True, in torch.hub, too. If a file cannot be hashed or renamed, the
    others are, and the exit status is 1.
    """
    found, has_failed = [], False
    for path in files:
        try:
            with wrap_read_errors(path):
                digest = sha256_of_file(path, lambda _: None)
            renamed = _renamed(path, digest) if rename else path
        except RankloadError as error:
            typer.echo(f"rankload: {in_shell_words(error)}", err=True)
            has_failed = True
        else:
            found.append({"path": str(renamed), "sha256": digest})
            if not as_json:
                typer.echo(f"{digest}  {renamed}")
    if as_json:
        print_json(found)
    if has_failed:
        raise typer.Exit(1)


def _renamed(path: Path, digest: str) -> Path:
    """Rename a file; one that has its name already stays.

    Raises:
        CacheError: another file has the name.
    """
    stem = _OLD_DIGEST.sub("", path.stem)
    target = path.with_name(f"{stem}-{digest[:_DIGITS]}{path.suffix}")
    if target != path:
        with wrap_write_errors(target):
            rename_if_absent(path, target)
    return target
