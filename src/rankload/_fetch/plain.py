"""A plain download to a path: no cache, no lease, no record."""

from __future__ import annotations

from pathlib import Path

from rankload._cache.layout import Entry
from rankload._fetch.download import download_and_publish
from rankload._settings import Settings
from rankload._types import FetchRequest, Progress


def download_to(url: str, destination: Path, hash_prefix: str | None, *, progress: bool) -> None:
    """Download a URL to a path, verified and atomically.

    Raises:
        FetchError, VerificationError, CacheError: see there. What was at the path stays.
    """
    path = destination.expanduser().absolute()
    request = FetchRequest(
        urls=(url,),
        directory=path.parent,
        file_name=path.name,
        hash_prefix=hash_prefix or None,
        must_be_checkpoint=False,
        progress=progress,
    )
    download_and_publish(url, request, Entry(path), _nobody_listens, Settings.from_environment())


def _nobody_listens(progress: Progress) -> None:
    pass
