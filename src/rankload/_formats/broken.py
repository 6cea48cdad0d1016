"""The one way in which the format modules say that a file is not what it claims to be."""

from __future__ import annotations

from rankload._text import cut, printable


class BrokenFileError(ValueError):
    """The file contradicts its own format; the text says how. Never reaches a user: others make it theirs.

    The text may hold names from the file. Unprintable characters and line breaks are escaped, and long texts are cut.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(cut(text)))


class CutOffError(BrokenFileError):
    """What was to be read continues past the last byte that was given."""
