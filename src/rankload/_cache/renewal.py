"""A mark beside the parts of a checkpoint: some parts have been renewed, and the others may be older.

The mark is set before the first part is replaced, and removed after the origin has been asked about all parts. The
process may be killed, or the origin fail, in between; parts of two versions must not be loaded as one checkpoint.
"""

from __future__ import annotations

import os
from contextlib import suppress

from rankload._cache.access import open_new
from rankload._cache.layout import Entry

#: Name of the mark. No record, lease or partial file has this ending.
_NAME = "partly-renewed"


def begin_renewal(entry: Entry) -> None:
    """Set the mark.

    Args:
        entry: cache entry of the index, or of a part beside the index.

    Raises:
        OSError: the mark cannot be set.
    """
    with suppress(FileExistsError):
        open_new(entry.record_path.parent / _NAME).close()


def is_partly_renewed(entry: Entry) -> bool:
    """Return whether the mark is set, by any user."""
    return os.path.lexists(entry.record_path.parent / _NAME)


def end_renewal(entry: Entry) -> None:
    """Remove the mark. A mark that stays costs one request per file at the next call."""
    with suppress(OSError):
        (entry.record_path.parent / _NAME).unlink()
