"""Keeps a download in touch with the other ranks, also while its origin is silent."""

from __future__ import annotations

import threading

from rankload._fetch.http import Body
from rankload._types import Progress, Report

#: How often others are told of the bytes, and how soon this download learns that nobody needs it any more.
_INTERVAL_SECONDS = 0.2


class Lookout:
    """Reports progress from a thread of its own while the context lasts.

    What the report raises (another rank has failed) breaks the body off, for the read that may be waiting for its next
    byte, and is raised when the context is left.

    Attributes:
        progress: what is reported; set it as bytes arrive.
    """

    def __init__(self, body: Body, report: Report, attempt: int) -> None:
        self.progress = Progress("downloading", 0, body.size_bytes, attempt)
        self._body, self._report = body, report
        self._error: Exception | None = None
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankload-lookout", daemon=True)

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_requested.set()
        self._thread.join()
        if self._error is not None:
            raise self._error from None  # the broken read is our own doing

    def _run(self) -> None:
        try:
            while not self._stop_requested.wait(_INTERVAL_SECONDS):
                self._report(self.progress)
        except Exception as error:
            self._error = error
            self._body.break_off()
