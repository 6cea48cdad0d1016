"""What the standard library's zipfile raises for a damaged or crafted archive, and what it unpacks in small pieces."""

from __future__ import annotations

import struct
import zipfile
import zlib

#: zipfile passes on what its parts raise: for an encrypted member, a name that is not UTF-8, an offset of 64 bits.
ZIPFILE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)

#: Compression methods that zipfile unpacks in chunks of limited size. Others can turn a few bytes into gigabytes.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
