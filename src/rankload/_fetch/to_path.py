"""Download to a path, without cache, lease or record."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rankload._cache.files import check_has_scheme, wrap_read_errors, wrap_write_errors
from rankload._cache.layout import Entry
from rankload._coordination.signals import TerminationAsException
from rankload._fetch.digests import check_digest, claims_of
from rankload._fetch.download import verify
from rankload._fetch.mirrors import Receiver
from rankload._fetch.models import FetchRequest
from rankload._fetch.offline import is_switched_off
from rankload._fetch.partials.partial import Partial
from rankload._fetch.partials.resume import remove_dead_partials
from rankload._fetch.request import UrlArgument, checked_urls, warn_of_short_prefix
from rankload._formats.source import open_regular
from rankload._settings import Settings
from rankload._types import Progress
from rankload._urls import expanded, is_own_name
from rankload.errors import CacheError, OfflineError

_READ_BYTES = 1 << 20


def download_to(
    url: UrlArgument, destination: Path, hash_prefix: str | None, *, progress: bool, settings: Settings | None = None
) -> None:
    """Download a URL (or its mirrors), or copy a ``file://`` URL, to a path, verified and atomically.

    After any error, a file that was at the path stays there. Without ``settings``, those of the environment count.

    Raises:
        FetchError: the URL did not serve the file.
        VerificationError: the file failed verification.
        CacheError: the file cannot be written.
        OfflineError: offline mode is on (RANKLOAD_OFFLINE), and the URL is not a ``file://`` URL.
    """
    path = expanded(destination).absolute()
    with wrap_write_errors(path):
        is_directory, is_other = path.is_dir(), path.exists() and not path.is_file()
    if is_directory:
        raise CacheError(f"cannot write {path}: Is a directory; name a file in it", path=str(path), errno=errno.EISDIR)
    if is_other:  # root could replace /dev/null by a file, for every process of the host
        raise CacheError(f"cannot write {path}: it is no regular file; name another", path=str(path))
    if is_own_name(path.name):  # a download would take the file for a partial file
        raise CacheError(
            f"cannot write {path}: this name is reserved for rankload's own files; choose another", path=str(path)
        )
    settings = settings or Settings.from_environment()
    request = FetchRequest(
        urls=checked_urls(url),
        directory=path.parent,
        file_name=path.name,
        hash_prefix=hash_prefix or None,
        must_be_checkpoint=False,
        progress=progress,
        max_bytes=settings.max_bytes or None,
    )
    if hash_prefix:
        warn_of_short_prefix(hash_prefix)
    entry, source = Entry(path), request.url.local_path
    if source is None and (settings.offline or is_switched_off(request.url)):
        display_name = request.url.display_name
        raise OfflineError(f"{display_name}: offline mode forbids fetching this URL", url=display_name)
    with _cleaning_up_on_sigterm():
        remove_dead_partials(entry, settings, now=0.0)
        with Partial(entry, settings, request.digest, may_be_left=False) as partial:
            if source is not None:
                _copy(source, request, partial)
            else:
                received = Receiver(request, partial, _nobody_listens, settings).receive(request.urls)
                verify(received, partial, request)
                partial.finish(received.size_bytes)
            partial.publish()


@contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    termination = TerminationAsException()
    termination.install()
    try:
        yield
    finally:
        termination.restore()


def _copy(source: Path, request: FetchRequest, partial: Partial) -> None:
    check_has_scheme(request.url.raw, source)
    digest = hashlib.sha256()
    with wrap_read_errors(source), open_regular(source) as file, closing(partial.writer()) as writer:
        while piece := file.read(_READ_BYTES):
            writer.write(piece, file.tell() - len(piece))
            digest.update(piece)
        size_bytes = file.tell()
    check_digest(digest.hexdigest(), claims_of(request), str(source))
    partial.finish(size_bytes)


def _nobody_listens(progress: Progress) -> None:
    pass
