"""Errors of the format modules for files that contradict their own format."""

from __future__ import annotations

from rankload._text import cut, printable


class BrokenFileError(ValueError):
    """The file contradicts its own format. Callers translate this error, so it never reaches a user.

    The text may contain names from the file. Unprintable characters and line breaks are escaped; long texts are cut.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(cut(text)))


class CutOffError(BrokenFileError):
    """The content continues past the last byte that the reader was given."""
