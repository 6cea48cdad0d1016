"""Make texts from files, servers and other ranks safe for messages and logs."""

from __future__ import annotations

#: Longest error text that travels between ranks. A store value of more than 8 MiB resets the connection, and such long
#: texts occur: one exception held a compiler's log.
MAX_MESSAGE_CHARACTERS = 4000

#: Longest line to which `on_one_line` joins a message; another rank prints the whole message.
_MAX_JOINED_LENGTH = 500

#: Longest name from a file in a message; longer names are cut.
MAX_SHOWN_NAME_LENGTH = 200


def cut(text: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Shorten a text, but keep its beginning (what happened) and its end (the innermost cause)."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[-half:]}"


def printable(text: str) -> str:
    r"""Escape a text from a file or a server for a message or a log.

    Characters that are not printable (`str.isprintable`) are escaped as in a Python literal: ``\x1b``, ``\n``,
    ``\u202e``. These are control characters, line separators, bidirectional overrides, invisible characters and lone
    surrogates. So no name can forge a log line, move the cursor or look like another name. An ordinary text is returned
    unchanged, and so is a text that this function has returned.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def on_one_line(message: str) -> str:
    """Join the lines of a message, and cut the result. A message of one line is returned unchanged."""
    first, *others = map(str.strip, message.split("\n"))
    if not others:
        return message
    joined = first
    for line in others:
        joined += f"{'' if joined.endswith(':') else ';'} {line}"
    return joined if len(joined) <= _MAX_JOINED_LENGTH else f"{joined[:_MAX_JOINED_LENGTH]}…"


def printable_lines(text: str) -> str:
    """Make each line of a text `printable`, and keep the line breaks."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def shown_key(key: object) -> str:
    """Return a dict's key for a message; for neither text nor number its type, since its repr may be huge."""
    return cut(repr(key), 200) if isinstance(key, (str, int, float, bool)) else type(key).__name__
