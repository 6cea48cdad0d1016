"""Parse values that a pickle stores as text (protocol 0), and floats."""

from __future__ import annotations

import codecs
import struct

#: Most digits of an integer: parsing takes quadratic time.
_MAX_DIGITS = 1000

#: Longest memo number that is read, in characters; no memo has so many values.
_MAX_NUMBER_LENGTH = 20


def value_of_line(operation: str, raw: bytes) -> object:
    """Return the value of an ``I``, ``L``, ``F``, ``S`` or ``V`` line.

    Args:
        operation: the operation's letter.
        raw: the line without its line break.

    Raises:
        TypeError: the line is malformed.
    """
    try:
        if operation == "V":
            return raw.decode("raw-unicode-escape")
        if operation == "S":
            return codecs.escape_decode(raw.strip()[1:-1])[0].decode("utf-8", errors="replace")
        text = raw.decode("ascii").strip()
        if operation == "F":
            return float(text)
        if operation == "I" and text in ("00", "01"):
            return text == "01"
        if len(text) > _MAX_DIGITS:
            raise TypeError("too many digits")
        return int(text.removesuffix("L"))
    except ValueError as error:
        raise TypeError(str(error)) from None


def number_of_line(raw: bytes) -> int:
    """Return the number of a ``g`` or ``p`` line.

    Raises:
        TypeError: the line is malformed.
    """
    digits = raw[:_MAX_NUMBER_LENGTH].strip()
    if not digits.isdigit():
        raise TypeError("a malformed number")
    return int(digits)


def float_of_bytes(raw: bytes) -> float:
    """Return the value of a BINFLOAT: eight bytes, big-endian."""
    (value,) = struct.unpack(">d", raw)
    return float(value)
