"""Shorten tracebacks: one traceback for a failure that all ranks share, without rankload's own frames."""

from __future__ import annotations

import functools
import logging
import pickle
import sys
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from rankload.errors import ArgumentMismatchError, RankFailedError, RankloadError, UnsafePickleError

_logger = logging.getLogger("rankload")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def short_tracebacks(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a public function so that its errors show only the caller's frames and the frame that failed.

    An error from another rank shows the caller's frames only: that rank prints the traceback of the failure. The full
    traceback, with all causes, is logged at DEBUG.
    """

    @functools.wraps(function)
    def public_call(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        try:
            return function(*arguments, **keywords)
        except RankloadError as error:
            _logger.debug("full traceback of the error raised by %s", function.__name__, exc_info=error)
            cause = _shown_cause(error)
            happened_elsewhere = error.is_from_another_rank or cause is not None
            if not error.is_from_another_rank:
                _point_to_documentation(error)
            traceback = _outside_frames(error.__traceback__, keeps_last=not happened_elsewhere)
            raise error.with_traceback(traceback) from cause

    return public_call


def _point_to_documentation(error: RankloadError) -> None:
    """Let the traceback end with the page that says what the error means; before Python 3.11 there are no notes."""
    note = f"What it means and what to do: {_documentation()}/reference/errors.md#{type(error).__name__.lower()}"
    if sys.version_info >= (3, 11) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


@functools.cache
def _documentation() -> str:
    """Return where the documentation is: the address that the package was built with, else the path in a checkout."""
    from importlib import metadata

    try:
        addresses = metadata.metadata("rankload").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
        addresses = []
    by_label: dict[str, str] = dict(address.split(", ", 1) for address in addresses)
    return by_label.get("Documentation", "docs")


def _shown_cause(error: RankloadError) -> BaseException | None:
    """Return the error's cause if it adds information, without repetitions in its own chain; else None.

    Hidden exceptions stay in ``__context__``, for debuggers.
    """
    printed: BaseException = error
    while (chained := _chained(printed)) is not None:
        if _says_nothing_new(printed, chained):
            printed.__cause__ = None  # this also sets __suppress_context__
            break
        further = _chained(chained)
        chained.__traceback__ = _outside_frames(chained.__traceback__, keeps_last=further is None)
        printed = chained
    return _chained(error)


def _chained(error: BaseException) -> BaseException | None:
    """Return the exception that Python prints before this one."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _says_nothing_new(error: BaseException, chained: BaseException) -> bool:
    if not isinstance(error, RankloadError):
        return False
    if error.is_from_another_rank:
        # ranks that read the same file find the same fault themselves; all raise the first rank's error
        if isinstance(chained, RankloadError):
            return type(chained) is type(error) and (
                isinstance(error, ArgumentMismatchError) or chained.message == error.message
            )
        return f"{type(chained).__name__}: {chained}" == error.message
    if isinstance(chained, RankloadError):
        return chained.message in error.message
    if isinstance(error, RankFailedError):  # raised by the caller's own code: its traceback shows where
        return False
    if isinstance(error, UnsafePickleError) and isinstance(chained, pickle.UnpicklingError):
        return True  # torch's message repeats the advice in ours
    text = chained.strerror if isinstance(chained, OSError) and chained.strerror else str(chained)
    return text in error.message


def _outside_frames(traceback: TracebackType | None, *, keeps_last: bool) -> TracebackType | None:
    """Return a traceback without rankload's frames, except perhaps the last, which raised the exception."""
    frames = []
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        is_ours = module == "contextlib" or module.partition(".")[0] == "rankload"
        is_the_end = keeps_last and traceback.tb_next is None
        if not is_ours or is_the_end:
            frames.append(traceback)
        traceback = traceback.tb_next
    outside = None
    for entry in reversed(frames):
        outside = TracebackType(outside, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return outside
