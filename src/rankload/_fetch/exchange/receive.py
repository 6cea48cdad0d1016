"""Fetch this node's part of a file, while the other parts come from the ring."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rankload._fetch.exchange.ring import Ring
from rankload._fetch.mirrors import Received
from rankload._fetch.models import FetchRequest
from rankload._fetch.origins.credentials import headers_of
from rankload._fetch.origins.registry import origin_for
from rankload._fetch.partials.partial import Partial
from rankload._fetch.progress import open_progress
from rankload._fetch.transfer.engine import TransferRunner
from rankload._fetch.transfer.failure_policy import Restart
from rankload._fetch.transfer.hasher import OrderedHasher
from rankload._fetch.transfer.retry import Retries
from rankload._fetch.transfer.size_limit import SizeLimit
from rankload._fetch.transfer.state import TransferState
from rankload._platform.byte_ranges import ByteRanges
from rankload._settings import Settings
from rankload._text import printable
from rankload._types import Progress, Report
from rankload._urls import Url
from rankload.errors import ContentChangedError, FetchTimeoutError, ProgressTimeoutError


def receive_in_ring(
    ring: Ring, url: Url, request: FetchRequest, partial: Partial, report: Report, settings: Settings,
    is_excused: Callable[[], bool] = lambda: False,
) -> Received:  # fmt: skip
    """Fill a partial file from the origin and from the ring. Return once the next node has all that it needs.

    Args:
        ring: this node's place in the ring.
        url: URL of the origin that this node asks.
        request: request for the file.
        partial: partial file, empty or with bytes of the ring's version.
        report: called with the progress.
        settings: deadlines and sizes.
        is_excused: returns whether another node has a good reason not to bring anything at the moment.

    Raises:
        ContentChangedError: the origin replaced the file meanwhile: parts of two versions do not fit.
        FetchError: the origin does not serve this node's part.
        ProgressTimeoutError: nothing comes from the node before.
        RankLostError: a neighbour in the ring is gone.
        CacheError: the bytes cannot be written.
        RankloadError: any error of ``report``.
    """
    file_name = printable(Path(request.file_name).name)

    def named_report(progress: Progress) -> None:
        report(replace(progress, file=file_name))

    hasher, adopted = OrderedHasher(partial.descriptor), ByteRanges(partial.spans)
    for begin, end in ring.foreign_spans:
        adopted.remove(begin, end)
    for begin, end in adopted:
        hasher.adopt(begin, end)
    partial.url_key = url.key
    initial_bytes = adopted.total_bytes
    with (
        open_progress(
            file_name, url.display_name, initial_bytes, settings.report_seconds, is_wanted=request.progress
        ) as show,
        closing(origin_for(url, headers_of(request, url), settings)) as origin,
    ):
        state = TransferState(
            origin, partial, hasher, ring.version,
            is_whole=False, has_digest=bool(request.digest), retries=Retries(settings), settings=settings,
            size_limit=SizeLimit(request.max_bytes, request.downloaded_bytes),
        )  # fmt: skip

        state.is_excused = is_excused

        def report_and_catch_up(progress: Progress) -> None:
            named_report(progress)
            ring.catch_up(state)

        try:
            hasher.start()
            if ring.is_fetched and ring.version.size_bytes is not None:
                state.size_limit.check(url.display_name, ring.version.size_bytes, is_announced=True)
            ring.start(state, partial)
            TransferRunner(state, report_and_catch_up, show, 1).run()
            ring.finish(named_report, settings.progress_seconds)
            sha256 = hasher.finish(lambda count: named_report(Progress("hashing", count)), settings.progress_seconds)
        except FetchTimeoutError:
            if (link := ring.awaited_link(state)) is None:
                raise
            raise ProgressTimeoutError(
                f"no byte of {url} came from rank {link.rank} on {link.host} for {settings.progress_seconds:g} s: a "
                "hung network, or a node before it that gets nothing either; raise timeout= if this is normal here",
                stuck_rank=link.rank,
                stuck_host=link.host,
            ) from None
        except Restart as restart:
            text = f"{url}: the file changed at its origin while the nodes fetched parts of it; make the call again"
            raise restart.error or ContentChangedError(text, url=url.display_name) from None
        finally:
            ring.stop()
            hasher.abort()
    assert state.version is not None
    return Received(url, state.version, hasher.done_bytes, sha256)
