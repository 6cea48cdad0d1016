"""What the ranks of these tests do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.checkpoints import assert_same, digest_of
from harness.fetch_calls import log_everything
from harness.rank import mark, mark_and_wait
from harness.ranks import RankResult


@dataclass(frozen=True)
class Outcome:
    """How one call ended on one rank.

    Attributes:
        ended_at: ``time.monotonic()``, comparable between processes.
        digest: of what was loaded, if it was.
        error: what was raised, if it was; its type's name and its text.
        fields: the error's fields, and its rank and host.
    """

    started_at: float
    ended_at: float
    digest: str | None = None
    error: str | None = None
    text: str = ""
    fields: dict[str, Any] | None = None

    @property
    def text_everywhere(self) -> str:
        """The text without what other ranks than the failing one say about where its traceback is."""
        return self.text.replace("; its traceback is there]", "]")


def load(rank: int, url: str, model_dir: str, **arguments: Any) -> str:
    """Loads, and returns the digest of the content."""
    from rankload import dist_load_state_dict_from_url

    return digest_of(dist_load_state_dict_from_url(url, model_dir, **arguments))


def load_like_torch(rank: int, url: str, model_dir: str, original: Path, **arguments: Any) -> None:
    """Loads, and compares with torch.load of the original."""
    from rankload import dist_load_state_dict_from_url

    assert_same(dist_load_state_dict_from_url(url, model_dir, **arguments), torch.load(original, weights_only=True))


def try_to_load(rank: int, url: str, model_dir: str, **arguments: Any) -> Outcome:
    """Loads, and returns how that ended."""
    from rankload import RankloadError, dist_load_state_dict_from_url

    started_at = time.monotonic()
    try:
        content = dist_load_state_dict_from_url(url, model_dir, **arguments)
    except RankloadError as error:
        fields = {**error.fields, "rank": error.rank, "host": error.host}
        mark("tried")
        return Outcome(started_at, time.monotonic(), None, type(error).__name__, str(error), fields)
    return Outcome(started_at, time.monotonic(), digest_of(content))


def try_and_tell(rank: int, url: str, model_dir: str, **arguments: Any) -> Outcome:
    """Tries to load; a rank that waits for another's download marks ``waiting``, and every rank logs its waits."""
    log_everything()
    with at_store_operation("request", "/fetched/", marking("waiting")):
        return try_to_load(rank, url, model_dir, **arguments)


def load_when_told(rank: int, url: str, model_dir: str, **arguments: Any) -> Outcome:
    """Tries to load once the test has opened the gate ``load``."""
    import rankload._api.state_dict  # noqa: F401 - so that what follows is the call alone

    mark_and_wait("ready")
    return try_to_load(rank, url, model_dir, **arguments)


def outcomes(results: list[RankResult]) -> list[Outcome]:
    return [result.value for result in results]


def leftovers(cache_dir: str) -> list[str]:
    """Files in a cache that should not outlive a call: partial files, leases, probes."""
    names = [str(path.relative_to(cache_dir)) for path in Path(cache_dir).rglob("*") if path.is_file()]
    return [name for name in names if not name.endswith((".json", ".pth"))]


@contextlib.contextmanager
def at_store_operation(method: str, key_part: str, action: Callable[[], None]) -> Iterator[None]:
    """Runs ``action`` before this rank's next store operations of that kind on a key that contains ``key_part``."""
    from rankload._coordination.store import RankStore

    original = getattr(RankStore, method)

    def operation(store: RankStore, key: str, *values: Any) -> Any:
        if key_part in key:
            action()
        return original(store, key, *values)

    setattr(RankStore, method, operation)
    try:
        yield
    finally:
        setattr(RankStore, method, original)


def marking(name: str) -> Callable[[], None]:
    return lambda: mark(name)
