"""What takes the place of open_clip's own download: itself, once per job."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankload._api.once_per_job import once_per_job
from rankload._urls import url_key

_logger = logging.getLogger("rankload")

MODULE, FUNCTION = "open_clip.pretrained", "download_pretrained_from_url"

#: open_clip/pretrained.py.
_DEFAULT_DIRECTORY = "~/.cache/clip"


def once(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the replacement of the function; None if it is not known."""
    if list(inspect.signature(original).parameters) != ["url", "cache_dir"]:
        _logger.warning("%s.%s of this version of open_clip is left alone", MODULE, FUNCTION)
        return None

    @functools.wraps(original)
    def download(url: str, cache_dir: Any = None) -> Any:
        directory = Path(cache_dir or _DEFAULT_DIRECTORY).expanduser().absolute()
        return once_per_job(
            lambda: original(url, cache_dir),
            key=f"open_clip {url_key(url)}",
            directory=directory,
            is_usable=os.path.exists,
            has_lease=False,
        )

    return download
