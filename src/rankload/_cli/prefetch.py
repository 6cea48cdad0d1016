"""``rankload prefetch``: fill the cache on a node with internet access."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from rankload._cli.app import app, in_shell_words
from rankload._urls import scheme_of, server_of
from rankload.errors import RankloadError

T = TypeVar("T")

#: Time within which Ctrl-C is noticed.
_SLICE_SECONDS = 0.2

#: Longer than calls may clean up at SIGTERM, which then ends the process (`rankload._coordination.thread_signals`).
_CLEAN_UP_SECONDS = 6.0


class VerifyChoice(str, Enum):
    """The choices of ``verify=``."""

    ONCE = "once"
    ALWAYS = "always"
    NEVER = "never"


@app.command()
def prefetch(
    urls: Annotated[list[str], typer.Argument(help="URLs of the files.", metavar="URL...")],
    mirror: Annotated[
        list[str] | None, typer.Option(help="Another URL of the same file; only with one URL.", metavar="URL")
    ] = None,
    model_dir: Annotated[
        Path | None,
        typer.Option(
            help="Cache directory.", show_default="RANKLOAD_MODEL_DIR, else torch.hub's checkpoints directory"
        ),
    ] = None,
    file_name: Annotated[
        str | None, typer.Option(help="File name in the cache; only with one URL.", show_default="the URL's file name")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected SHA-256, 64 hex digits; only with one URL.")] = None,
    check_hash: Annotated[
        bool, typer.Option("--check-hash", help="Compare the SHA-256 with the hash prefix in the file name.")
    ] = False,
    verify: Annotated[VerifyChoice, typer.Option(help="When to hash a cached file again.")] = VerifyChoice.ONCE,
    sidecar: Annotated[
        bool, typer.Option("--sidecar", help="Require that the file URL.sha256 at the origin vouches for the file.")
    ] = False,
    header: Annotated[
        list[str] | None,
        typer.Option(help="Extra request header for one server: 'Name: value', or '@FILE' for headers in a file."),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(help="Refuse to download more bytes per URL.", show_default="RANKLOAD_MAX_BYTES, else no limit"),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask the origin whether a cached file is still current.")
    ] = False,
    any_file: Annotated[bool, typer.Option("--any-file", help="Accept files that are not checkpoints.")] = False,
    jobs: Annotated[int, typer.Option(help="Fetch so many files at a time.", min=1)] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Fetch and verify files, and print their paths in the cache. Compute nodes can then load them offline.

    If a file cannot be fetched, the others are still fetched, and the exit status is 1.
    """
    from rankload._api.fetch import fetch_in_this_process

    for option, value in (("--mirror", mirror), ("--file-name", file_name), ("--sha256", sha256)):
        if value and len(urls) > 1:
            raise typer.BadParameter("this option is for one file; pass one URL", param_hint=option)
    headers = dict(map(_split, _lines(header or [])))
    if headers and len({_server_of(url) for url in urls}) > 1:
        raise typer.BadParameter("headers are for one server, but the URLs are on several", param_hint="--header")

    def fetch(url: str) -> Path:
        return fetch_in_this_process(
            [url, *mirror] if mirror else url,
            model_dir,
            file_name=file_name,
            sha256=sha256,
            check_hash=check_hash,
            verify=verify.value,
            sidecar=sidecar,
            headers=headers,
            must_be_checkpoint=not any_file,
            max_bytes=max_bytes,
            refresh=refresh,
            progress=not quiet,
        ).path

    has_failed = False
    try:
        for outcome in in_order(fetch, urls, jobs):
            if isinstance(outcome, RankloadError):
                typer.echo(f"rankload: {in_shell_words(outcome)}", err=True)
                has_failed = True
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                typer.echo(outcome)
    except KeyboardInterrupt:
        if len(urls) > 1 and jobs > 1:  # calls on other threads hear of SIGTERM alone, and then clean up
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(_CLEAN_UP_SECONDS)
        raise
    if has_failed:
        raise typer.Exit(1)


def _server_of(url: str) -> object:
    """Return what two URLs, or names in a table, of one server have in common."""
    from rankload._fetch.checkpoint_table import find_checkpoint

    if (named := find_checkpoint(url)) is not None:
        url = named.urls[0]
    return server_of(url) or scheme_of(url)


def in_order(function: Callable[[str], T], arguments: Sequence[str], count: int) -> Iterator[T | Exception]:
    """Call a function for each argument, several at a time, and yield results and errors in the arguments' order.

    The threads are daemons: the process does not wait for downloads that nobody needs any more.

    Args:
        function: may run on another thread.
        arguments: the arguments.
        count: most calls at a time. A single call runs on this thread.
    """
    if len(arguments) == 1 or count == 1:
        yield from (_outcome(function, argument) for argument in arguments)
        return
    waiting = queue.SimpleQueue[int]()
    outcomes: list[queue.SimpleQueue[T | Exception]] = [queue.SimpleQueue() for _ in arguments]

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                number = waiting.get_nowait()
                outcomes[number].put(_outcome(function, arguments[number]))

    for number in range(len(arguments)):
        waiting.put(number)
    for _ in range(min(count, len(arguments))):
        threading.Thread(target=work, name="rankload-prefetch", daemon=True).start()
    for outcome in outcomes:
        yield _awaited(outcome)


def _awaited(outcome: queue.SimpleQueue[T]) -> T:
    """Wait in slices: a signal that another thread received does not wake this one, which runs Python's handlers."""
    while True:
        with suppress(queue.Empty):
            return outcome.get(timeout=_SLICE_SECONDS)


def _outcome(function: Callable[[str], T], argument: str) -> T | Exception:
    try:
        return function(argument)
    except Exception as error:
        return error


def _lines(headers: list[str]) -> Iterator[str]:
    """Yield headers, those in ``@FILE`` one by one. Every user of the host can read a command line; a file is safer."""
    for header in headers:
        if not header.startswith("@"):
            yield header
            continue
        try:
            yield from filter(str.strip, Path(header[1:]).read_text().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not a text file"
            raise typer.BadParameter(f"cannot read {header[1:]}: {why}", param_hint="--header") from None


def _split(header: str) -> tuple[str, str]:
    name, colon, value = header.partition(":")
    if not colon:
        raise typer.BadParameter("expected 'Name: value'", param_hint="--header")
    return name.strip(), value.strip()
