"""Open a collective call: settings, the channel to the other ranks, agreement on the arguments."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from rankload._coordination.call_context import CallContext
from rankload._coordination.membership import open_channel
from rankload._settings import Settings, misspelt, variable
from rankload._types import Delivery, Identity
from rankload.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_logger = logging.getLogger("rankload")


@contextmanager
def collective_call(group: ProcessGroup | None, timeout: float | None) -> Iterator[CallContext]:
    """Open a collective call, and close it with the verdict of all ranks. Collective.

    A fault in the settings is raised inside the channel: so the other ranks raise it, too.

    Args:
        group: the ranks of the call; None for the default process group or, without one, the launcher's job.
        timeout: no-progress deadline in seconds; None for the setting.
    """
    problem = None
    try:
        settings = _settings(timeout)
    except ArgumentError as error:
        settings, problem = Settings(), error
    with open_channel(group, settings) as channel:
        if problem is not None:
            raise problem
        if channel.identity.rank == 0:
            _warn_of_misspelt_variables()
        with ExitStack() as stack:
            yield CallContext(channel, settings, stack, group)


def agree_on_delivery(
    call: CallContext,
    arguments: dict[str, Any],
    delivery: Delivery,
    src: int | None,
) -> tuple[Delivery, int]:
    """Agree on all arguments of the call. Collective.

    Args:
        call: context of the call.
        arguments: all other arguments that must be the same on every rank, by name.
        delivery: the caller's ``delivery=``.
        src: the caller's ``src=``: a global rank; None for the first rank of the group.

    Returns:
        The delivery to use, and the rank of the source within the channel.

    Raises:
        ArgumentError: there is no such delivery, or the group has no such rank.
        ArgumentMismatchError: another rank passed different arguments.
    """
    if delivery not in (deliveries := get_args(Delivery)):
        raise ArgumentError(f"delivery={delivery!r}: expected one of {', '.join(map(repr, deliveries))}")
    source = 0 if src is None else _rank_in_channel(src, call.identity, call.group)
    arguments = {**arguments, "delivery": delivery, "src": src}
    if delivery == "broadcast":
        arguments[variable("broadcast_over_group")] = call.settings.broadcast_over_group
    call.channel.agree(arguments)
    return "read" if call.identity.world_size == 1 else delivery, source


@cache  # once per process
def _warn_of_misspelt_variables() -> None:
    for name, meant in misspelt(os.environ).items():
        _logger.warning("%s is set, but rankload has no setting of that name; did you mean %s?", name, meant)


def _settings(timeout: float | None) -> Settings:
    settings = Settings.from_environment()
    if timeout is None:
        return settings
    if not isinstance(timeout, (int, float)) or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ArgumentError(f"timeout={timeout!r}: expected a positive number of seconds")
    return replace(settings, progress_seconds=timeout)


def _rank_in_channel(src: int, identity: Identity, group: ProcessGroup | None) -> int:
    rank = src
    if group is not None:
        from torch.distributed import get_group_rank

        try:
            rank = get_group_rank(group, src)
        except (ValueError, RuntimeError) as error:
            raise ArgumentError(f"src={src!r}: not a rank of the group: {error}") from error
    if not isinstance(rank, int) or not 0 <= rank < identity.world_size:
        raise ArgumentError(f"src={src!r}: expected a rank from 0 to {identity.world_size - 1}")
    return rank
