"""What the tests of the fetch run in ranks, and how they look at the outcome."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.checkpoints import digest_of
from harness.origin import Origin
from harness.rank import mark
from harness.ranks import RankResult, run_ranks

LOG_FORMAT = "%(levelname)s %(message)s"


def load(rank: int, url: Any, model_dir: Any, **arguments: Any) -> str:
    """The digest of what dist_load_state_dict_from_url returns; rankload's whole log goes to stderr."""
    from rankload import dist_load_state_dict_from_url

    log_everything()
    return digest_of(dist_load_state_dict_from_url(url, model_dir, **arguments))


def fetch(rank: int, url: Any, model_dir: Any, **arguments: Any) -> str:
    """The path that dist_fetch returns."""
    from rankload import dist_fetch

    log_everything()
    return str(dist_fetch(url, model_dir, **arguments))


def fetch_and_mark(rank: int, url: Any, model_dir: Any, **arguments: Any) -> bytes:
    """The bytes that dist_fetch found, for tests that watch the ranks from outside."""
    mark("begins")
    return Path(fetch(rank, url, model_dir, **arguments)).read_bytes()


def log_everything() -> None:
    logging.basicConfig(format=LOG_FORMAT)
    logging.getLogger("rankload").setLevel(logging.DEBUG)


def errors_of(function: Any, url: Any, model_dir: Any, *, ranks: int = 2, **arguments: Any) -> list[BaseException]:
    """Runs a call that must fail on every rank, and returns each rank's error."""
    results = run_ranks(function, ranks, args=(url, model_dir), kwargs=arguments, timeout_seconds=40)
    return [error_in(result) for result in results]


def error_in(result: RankResult) -> BaseException:
    assert result.exception is not None, result.describe()
    return result.exception.original


def expect(errors: list[BaseException], kind: type[BaseException], *texts: str) -> None:
    """Asserts that every rank got the same error, of that kind, saying all this."""
    for error in errors:
        assert isinstance(error, kind), repr(error)
        for text in texts:
            assert text in str(error), f"{text!r} is not in {error}"
    assert len({(type(error), str(error)) for error in errors}) == 1, errors


def files_in(directory: Path) -> list[str]:
    """All files below, by relative path; hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def left_in(directory: Path) -> list[str]:
    """Files that no cache should keep after its last call: partials, leases, temporary files, probes."""
    endings = (".partial", ".lease", ".tmp")
    return [name for name in files_in(directory) if name.endswith(endings) or "probe" in name]


def ranges_asked(origin: Origin, name: str | None = None) -> list[str | None]:
    """The Range header of each request so far; None where there was none."""
    return [request.headers.get("range") for request in origin.requests(name)]


@contextlib.contextmanager
def whole_log(caplog: Any) -> Iterator[Any]:
    with caplog.at_level(logging.DEBUG, logger="rankload"):
        yield caplog
