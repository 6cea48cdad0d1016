"""Create cache directories."""

from __future__ import annotations

from pathlib import Path

from rankload._cache.files import CHOOSE_ANOTHER, why_no_room
from rankload.errors import CacheError


def make_directory(directory: Path) -> None:
    """Make the cache directory.

    Raises:
        CacheError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot make the cache directory {directory}: {error.strerror}{why_no_room(directory, error)}; "
            f"{CHOOSE_ANOTHER}",
            path=str(directory),
            errno=error.errno,
        ) from error
