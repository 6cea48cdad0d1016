"""Keep secrets out of urllib3's log, which shows the full URL of every request."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

#: The first logs each request at DEBUG. Either one, depending on urllib3's version, logs invalid headers at WARNING.
_LOGGERS = (logging.getLogger("urllib3.connectionpool"), logging.getLogger("urllib3.connection"))


class _WithoutQueries(logging.Filter):
    """Cuts queries off in log records of threads that send one of rankload's requests. Other records stay unchanged.

    Attributes:
        of_thread: thread-local state. Such a thread has ``is_ours`` set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_thread = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        """Cut the queries off; let every record through."""
        if hasattr(self.of_thread, "is_ours") and isinstance(record.args, tuple):
            record.args = tuple(_without_query(argument) for argument in record.args)
        return True


_filter = _WithoutQueries()


@contextlib.contextmanager
def without_queries() -> Iterator[None]:
    """Cut queries off in urllib3's log records of this thread: a query may hold signatures and tokens."""
    for logger in _LOGGERS:
        logger.addFilter(_filter)  # adding the same filter again has no effect
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
