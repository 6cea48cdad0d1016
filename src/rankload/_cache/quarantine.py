"""Move a rejected file aside and record why."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rankload._cache.access import make_own_directory, open_new, share_file
from rankload._cache.layout import Entry


def quarantine(entry: Entry, reason: str, move_to: Callable[[Path], object]) -> Path | None:
    """Move a rejected file aside and return its new path. Return None if that fails; the file then stays.

    Only the last rejected file of an entry is kept: a broken origin must not fill the disk. Renaming does not disturb a
    process that has the file mapped.

    Args:
        entry: cache entry that the file belongs to.
        reason: error text; no secrets.
        move_to: renames the file to the given path.
    """
    path = entry.quarantine_path
    try:
        make_own_directory(entry.record_path.parent)
        make_own_directory(path.parent)
        move_to(path)
    except OSError:
        return None
    note = {"reason": reason, "quarantined_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    note_path = path.with_name(path.name + ".json")
    with suppress(OSError):
        note_path.unlink(missing_ok=True)  # the old note may be another user's, or a symbolic link
        with open_new(note_path) as file:
            share_file(file.fileno(), path.parent)
            file.write(json.dumps(note, indent=1) + "\n")
    return path
