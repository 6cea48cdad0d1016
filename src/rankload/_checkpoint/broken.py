"""The one way in which the format modules say that a file is not what it claims to be."""

from __future__ import annotations


class BrokenFileError(ValueError):
    """The file contradicts its own format; the text says how. Never reaches a user: others make it theirs."""


class CutOffError(BrokenFileError):
    """What was to be read goes on behind the last byte that was given."""
