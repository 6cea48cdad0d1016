"""Keeps signed queries out of other libraries' logs.

At level DEBUG urllib3 writes the full path of every request; and at WARNING, which is on by default, the URL of an
answer whose headers cannot be parsed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_state = threading.local()


@contextmanager
def discreet() -> Iterator[None]:
    """Let urllib3 log no query of the requests that this thread makes meanwhile. Other threads' stay as they are."""
    _state.is_discreet = True
    try:
        yield
    finally:
        _state.is_discreet = False


class _WithoutQueries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(_state, "is_discreet", False) and isinstance(record.args, tuple):
            record.args = tuple(
                argument.partition("?")[0] if isinstance(argument, str) else argument for argument in record.args
            )
        return True


for _name in ("urllib3.connectionpool", "urllib3.connection"):  # the warning's depends on the version
    logging.getLogger(_name).addFilter(_WithoutQueries())
