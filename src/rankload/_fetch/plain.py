"""A plain download to a path: no cache, no lease, no record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankload._cache.failures import reading
from rankload._cache.layout import Entry, local_path_of
from rankload._fetch.digest import DigestThread
from rankload._fetch.download import verified_partial
from rankload._fetch.partial import Partial, remove_dead_partials
from rankload._fetch.verify import check_digest
from rankload._job.signals import TerminationAsException
from rankload._settings import Settings
from rankload._types import FetchRequest, Progress

_READ_BYTES = 1 << 20


def download_to(url: str, destination: Path, hash_prefix: str | None, *, progress: bool) -> None:
    """Download a URL to a path, or copy a ``file://`` URL there, verified and atomically.

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
    entry, source = Entry(path), local_path_of(url)
    with _cleaning_up_on_sigterm():
        remove_dead_partials(entry)
        if source is not None:
            _copy(source, request, entry)
            return
        with verified_partial(url, request, entry, _nobody_listens, Settings.from_environment()) as (partial, _):
            partial.publish()


@contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    termination = TerminationAsException()
    termination.install()
    try:
        yield
    finally:
        termination.restore()


def _copy(source: Path, request: FetchRequest, entry: Entry) -> None:
    with reading(source), source.open("rb") as file, Partial(entry, source.stat().st_size) as partial:
        digest = DigestThread()
        try:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                partial.write(piece)
        finally:
            sha256 = digest.finish()
        check_digest(sha256, request, str(source))
        partial.finish()
        partial.publish()


def _nobody_listens(progress: Progress) -> None:
    pass
