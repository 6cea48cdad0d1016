"""``rankload prefetch``: fill the cache on a node that has internet."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Verify(str, Enum):
    """The choices of ``verify=``."""

    ONCE = "once"
    ALWAYS = "always"
    NEVER = "never"
    SIDECAR = "sidecar"


def prefetch(
    urls: Annotated[list[str], typer.Argument(help="URL of the file; further ones are its mirrors.", metavar="URL...")],
    model_dir: Annotated[
        Path | None, typer.Option(help="Cache directory.", show_default="torch.hub's checkpoints directory")
    ] = None,
    file_name: Annotated[str | None, typer.Option(help="Name in the cache.", show_default="the URL's")] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected digest, 64 hex digits.")] = None,
    check_hash: Annotated[bool, typer.Option("--check-hash", help="Compare with the prefix in the file name.")] = False,
    verify: Annotated[Verify, typer.Option(help="When to hash a cached file again.")] = Verify.ONCE,
    header: Annotated[
        list[str] | None, typer.Option(help="Extra request header, as 'Name: value'; as '@FILE': those in a file.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Refuse to download more.", show_default="RANKLOAD_MAX_BYTES, else no limit")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask the origin whether a cached file is still its file.")
    ] = False,
    any_file: Annotated[bool, typer.Option("--any-file", help="Accept what is no checkpoint, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Fetch a file into the cache, verified, and print its path. Compute nodes then load it offline."""
    from rankload._api import fetch_in_this_process

    file = fetch_in_this_process(
        urls,
        model_dir,
        file_name=file_name,
        sha256=sha256,
        check_hash=check_hash,
        verify=verify.value,
        headers=dict(map(_split, _lines(header or []))),
        must_be_checkpoint=not any_file,
        max_bytes=max_bytes,
        refresh=refresh,
        progress=not quiet,
    )
    typer.echo(file.path)


def _lines(headers: list[str]) -> Iterator[str]:
    """Yield them one by one. A command line can be read by everybody on the host; a file need not be."""
    for header in headers:
        if not header.startswith("@"):
            yield header
            continue
        try:
            yield from filter(str.strip, Path(header[1:]).read_text().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise typer.BadParameter(f"cannot read {header[1:]}: {why}", param_hint="--header") from None


def _split(header: str) -> tuple[str, str]:
    name, colon, value = header.partition(":")
    if not colon:
        raise typer.BadParameter("expected 'Name: value'", param_hint="--header")
    return name.strip(), value.strip()
