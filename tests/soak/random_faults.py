"""An origin whose every reply is drawn at random from all kinds of misbehaviour, and several streams over tiny chunks.

PYTHONPATH=tests:src python -m soak.random_faults --runs 200 --seed 1
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from harness.origin import Origin, Reply
from harness.ranks import RankResult, run_ranks
from rankload import RankloadError
from soak.cache import assert_nothing_but_resumable, assert_published_is
from soak.jobs import fetch_digest
from soak.runs import start

NAME = "file.bin"

ENVIRONMENT = {
    "RANKLOAD_STREAMS": "4",
    "RANKLOAD_CHUNK_BYTES": "8192",
    "RANKLOAD_RETRIES": "6",
    "RANKLOAD_BACKOFF_SECONDS": "0.01",
    "RANKLOAD_RETRY_AFTER_SECONDS": "0.5",
    "RANKLOAD_STALL_SECONDS": "0.3",
    "RANKLOAD_CONNECT_SECONDS": "1",
    "RANKLOAD_PROGRESS_SECONDS": "3",
}
DEADLINE_SECONDS = 60

#: What shows, whatever the caller knows.
_HARMLESS: list[dict[str, Any]] = [{}, {}, {}, {"bytes_per_second": 200_000}, {"is_chunked": True}]
_DETECTABLE: list[dict[str, Any]] = [
    *({"ranges": kind} for kind in ("shorter", "longer", "wrong-start", "wrong-total", "no-content-range", "refused")),
    *({"status": code, "headers": {"Retry-After": "0"}} for code in (429, 503)),
    *({"status": code} for code in (408, 500, 502, 503)),
    {"close_before_reply": True},
    {"hold_before_reply": True},
    {"max_concurrent": 1},
    {"content_length": 10},  # of an answer without a range: contradicts the others
    {"etag": '"another version"'},
]
_PERMANENT: list[dict[str, Any]] = [{"status": 404}, {"status": 403}, {"is_gzipped": True}]

#: What only a digest shows.
_SILENT: list[dict[str, Any]] = [
    {"ranges": "shifted"},
    {"ranges": "ignored"},
    {"flip_byte_at": 0},
    {"body": b"<!DOCTYPE html><html>Please sign in</html>", "content_type": "text/html"},
    {"content_length": False},
    {"etag": False, "last_modified": None},
]


def run(source: random.Random, directory: Path) -> tuple[str, str]:
    """The call returns the right bytes or raises an error of ours, in time; nothing wrong is published or left."""
    sizes = [source.choice([1, 8192, 50_000, 300_000, 300_000]) for _ in range(2)]
    contents = [source.randbytes(size_bytes) for size_bytes in (sizes[0], source.choice(sizes))]
    digest = hashlib.sha256(contents[0]).hexdigest() if source.random() < 0.5 else None
    is_replaced = digest is None and source.random() < 0.4
    replies = [draw(source, len(contents[0]), knows_digest=digest is not None) for _ in range(60)]
    if is_replaced:  # one name for two versions would hide that from anybody
        replies = [reply for reply in replies if reply.etag is True]
    cache = directory / "cache"
    with Origin() as origin:
        url = origin.add(NAME, contents[0], *replies, Reply())
        urls = [url]
        if source.random() < 0.3:
            mirror = [draw(source, len(contents[0]), knows_digest=digest is not None) for _ in range(10)]
            urls.append(origin.add("mirror.bin", contents[0], *mirror, Reply()))
        if is_replaced:
            _replace_soon(origin, contents[1], source.randrange(8))
        results = run_ranks(
            fetch_digest, 1, DEADLINE_SECONDS, env="none",
            args=(urls, str(cache)), kwargs={"sha256": digest}, rank_env={0: ENVIRONMENT},
        )  # fmt: skip
        requests = origin.request_count()
    right = contents if is_replaced else contents[:1]
    outcome = _outcome(results[0], {hashlib.sha256(content).hexdigest() for content in right})
    is_published = assert_published_is(cache / NAME, *right)
    assert is_published == (outcome == "right"), f"{outcome}, but {'published' if is_published else 'not published'}"
    assert_nothing_but_resumable(cache, NAME)
    what = f"{len(contents[0])} bytes, {'with' if digest else 'without'} digest, {len(urls)} URLs, {requests} requests"
    return what + (", replaced" if is_replaced else ""), outcome


def draw(source: random.Random, size_bytes: int, *, knows_digest: bool) -> Reply:
    """A reply: a third are good, a few fail for good."""
    if source.random() < 0.33:
        return Reply(**source.choice(_HARMLESS))
    if source.random() < 0.02:
        return Reply(**source.choice(_PERMANENT))
    if source.random() < 0.4:  # it breaks somewhere in the body
        how = source.choice(["truncate_at", "reset_at", "hold_at"])
        return Reply(**{how: source.randrange(min(size_bytes, 20_000)), **source.choice(_HARMLESS)})
    return Reply(**source.choice(_DETECTABLE + (_SILENT if knows_digest else [])))


def _replace_soon(origin: Origin, content: bytes, after_requests: int) -> None:
    """Another file takes the place of the first, once so many requests have come."""
    begin = origin.begin

    def begin_or_replace(*arguments: Any) -> Any:
        if origin.request_count(NAME) == after_requests:
            origin.add(NAME, content)
        return begin(*arguments)

    origin.begin = begin_or_replace  # type: ignore[method-assign]


def _outcome(result: RankResult, digests: set[str]) -> str:
    if result.exception is None:
        assert result.value in digests, "wrong bytes were returned"
        return "right"
    assert result.exception.pickled is not None, result.describe()
    assert isinstance(result.exception.original, RankloadError), result.describe()
    return result.exception.type_name


if __name__ == "__main__":
    start("random_faults", run)
