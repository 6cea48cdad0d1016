"""Keep secrets out of urllib3's log, which shows the full URL of every request."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

#: At DEBUG the one tells each request; at WARNING either, depending on the version, of headers that cannot be parsed.
_LOGGERS = (logging.getLogger("urllib3.connectionpool"), logging.getLogger("urllib3.connection"))


class _WithoutQueries(logging.Filter):
    """Cuts the queries off in what is logged by a thread that sends a request of ours; others' lines stay as they are.

    Attributes:
        of_thread: ``is_ours`` is there in such a thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_thread = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every line through."""
        if hasattr(self.of_thread, "is_ours") and isinstance(record.args, tuple):
            record.args = tuple(_without_query(argument) for argument in record.args)
        return True


_filter = _WithoutQueries()


@contextlib.contextmanager
def without_queries() -> Iterator[None]:
    """Show no query in what urllib3 logs in this thread meanwhile: signatures and tokens stand there."""
    for logger in _LOGGERS:
        logger.addFilter(_filter)  # once, however often it is called
    _filter.of_thread.is_ours = True
    try:
        yield
    finally:
        del _filter.of_thread.is_ours


def _without_query(argument: object) -> object:
    if not isinstance(argument, str):
        return argument
    path, mark, _ = argument.partition("?")
    return path + mark + "…" if mark else argument
