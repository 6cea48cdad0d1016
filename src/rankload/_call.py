"""What every collective call begins with: its settings, and the channel that ends in one outcome on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from rankload._errors import ArgumentError
from rankload._job.channel import RankChannel
from rankload._job.lone import LoneChannel
from rankload._job.membership import open_channel
from rankload._settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def collective_call(
    group: ProcessGroup | None, timeout: float | None
) -> Iterator[tuple[LoneChannel | RankChannel, Settings]]:
    """Open the channel. What is wrong with the settings is raised within, where the other ranks hear of it."""
    problem = None
    try:
        settings = _settings(timeout)
    except ArgumentError as error:
        settings, problem = Settings(), error
    with open_channel(group, settings) as channel:
        if problem is not None:
            raise problem
        yield channel, settings


def _settings(timeout: float | None) -> Settings:
    settings = Settings.from_environment()
    if timeout is None:
        return settings
    if not isinstance(timeout, (int, float)) or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ArgumentError(f"timeout={timeout!r}: expected a positive number of seconds")
    return replace(settings, progress_seconds=timeout)
