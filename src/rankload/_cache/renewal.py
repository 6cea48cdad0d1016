"""A mark beside the files of one checkpoint: some of them have been renewed, and the others may be older.

It is set before the first of them is replaced, and taken away when the origin has been asked about all. A process may
be killed between, or the origin fail; parts of two versions must not be taken for one checkpoint.
"""

from __future__ import annotations

import os
from contextlib import suppress

from rankload._cache.access import open_new
from rankload._cache.layout import Entry

#: No record, lease or partial file ends so.
_NAME = "partly-renewed"


def begin_renewal(entry: Entry) -> None:
    """Set the mark.

    Args:
        entry: of the index, or of a part that lies beside it.

    Raises:
        OSError: it cannot be set.
    """
    with suppress(FileExistsError):
        open_new(entry.record_path.parent / _NAME).close()


def is_partly_renewed(entry: Entry) -> bool:
    """Return whether the mark is there, whoever has set it."""
    return os.path.lexists(entry.record_path.parent / _NAME)


def end_renewal(entry: Entry) -> None:
    """Take the mark away. One that stays costs a request per file at the next call."""
    with suppress(OSError):
        (entry.record_path.parent / _NAME).unlink()
