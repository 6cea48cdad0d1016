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
    """Set a bad file aside and return where it is; None if that cannot be done, and the file stays where it was.

    One file per entry is kept, the last: a broken origin must not fill the disk. Renaming does not disturb a process
    that has the file mapped.

    Args:
        entry: whose file it was, or was to become.
        reason: why, as an error said it; no secrets.
        move_to: renames the file to the path that it is given.
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
        note_path.unlink(missing_ok=True)  # it may be another user's, or a link to anything
        with open_new(note_path) as file:
            share_file(file.fileno(), path.parent)
            file.write(json.dumps(note, indent=1) + "\n")
    return path
