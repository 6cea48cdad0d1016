"""Texts that come from files, servers and other ranks, made fit for messages and logs."""

from __future__ import annotations

#: Longest error text that travels between ranks. A store value of more than 8 MiB resets the connection, and
#: nobody reads that much (a compiler log in an exception text has been seen).
MAX_MESSAGE_CHARACTERS = 4000

#: Longest line that a message of several lines is joined to, where another rank prints all of it.
_MAX_JOINED_LENGTH = 500

#: Longer names from files are cut in messages.
MAX_SHOWN_NAME_LENGTH = 200


def cut(text: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Shorten a text, keeping its beginning (what) and its end (the innermost cause)."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[-half:]}"


def printable(text: str) -> str:
    r"""Return a text from a file or a server as it may stand in a message or a log.

    Characters that are not printable (`str.isprintable`) are escaped as in a Python literal: ``\x1b``, ``\n``,
    ``\u202e``. That covers control characters, line separators, bidirectional overrides, invisible characters and lone
    surrogates, so that no name can forge a log line, move the cursor or show as another one. Ordinary texts come back
    unchanged, and what this function returned always does.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def on_one_line(message: str) -> str:
    """Join the lines of a message, and cut what becomes long; a message of one line comes back unchanged."""
    first, *others = map(str.strip, message.split("\n"))
    if not others:
        return message
    joined = first
    for line in others:
        joined += f"{'' if joined.endswith(':') else ';'} {line}"
    return joined if len(joined) <= _MAX_JOINED_LENGTH else f"{joined[:_MAX_JOINED_LENGTH]}…"


def printable_lines(text: str) -> str:
    """Return a text of several lines with each of them `printable`."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def shown_key(key: object) -> str:
    """Show a dict's key in a message; of what is neither text nor number, and may be endless, its type."""
    return cut(repr(key), 200) if isinstance(key, (str, int, float, bool)) else type(key).__name__
