"""What a rank of the chaos soak does, and how its fault strikes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.checkpoints import digest_of
from harness.rank import mark


@dataclass(frozen=True)
class Plan:
    """What the ranks of a job do, and what happens to one of them."""

    directory: str
    has_own_directories: bool = False
    is_in_group: bool = False
    delivery: str = "read"
    calls: int = 1
    victim: int = -1
    fault: str = "none"
    call: int = 0
    operation: int = 0


@dataclass(frozen=True)
class Ended:
    """How a call ended on a rank."""

    digest: str | None = None
    error: str = ""


def make_calls(rank: int, url: str, plan: Plan) -> list[Ended]:
    """Make the calls of the plan; a call that fails is the last one if a rank was lost by then."""
    import torch.distributed as dist

    if plan.is_in_group:
        dist.init_process_group("gloo")
    directory = f"{plan.directory}/{'node' + str(rank) if plan.has_own_directories else 'cache'}"
    ended: list[Ended] = []
    for call in range(plan.calls):
        fault = plan.fault if rank == plan.victim and call == plan.call else "none"
        ended.append(_call(url, directory, plan, fault))
        if ended[-1].error and plan.fault != "cannot load":
            break
    return ended


def _call(url: str, directory: str, plan: Plan, fault: str) -> Ended:
    from rankload import RankloadError, dist_load_state_dict_from_url

    def adapt(state_dict: dict[str, Any]) -> dict[str, Any]:
        if fault == "cannot load":
            raise ValueError("no such layer")
        return state_dict

    strike = _STRIKES.get(fault)
    restore = _before_operation(plan.operation, strike) if strike else None
    try:
        content = dist_load_state_dict_from_url(url, directory, progress=False, delivery=plan.delivery, adapt=adapt)
    except RankloadError as error:
        return Ended(error=f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return Ended(error="KeyboardInterrupt")
    finally:
        if restore:
            restore()
    return Ended(digest_of(content))


def _before_operation(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """Run something before one of the store operations of this rank's main thread; return what undoes that."""
    import threading

    from rankload._coordination.store import RankStore

    originals, left = (RankStore._call, RankStore.request), [number]

    def count() -> None:
        if threading.current_thread() is threading.main_thread():
            left[0] -= 1
            if left[0] == -1:
                action()

    def call(store: RankStore, operation: Any) -> Any:
        count()
        return originals[0](store, operation)

    def request(store: RankStore, key: str) -> Any:
        count()
        return originals[1](store, key)

    RankStore._call, RankStore.request = call, request  # type: ignore[method-assign, assignment]

    def restore() -> None:
        RankStore._call, RankStore.request = originals  # type: ignore[method-assign]

    return restore


def _freeze() -> None:
    mark("freezes")
    os.kill(os.getpid(), signal.SIGSTOP)


def _interrupt() -> None:
    raise KeyboardInterrupt


_STRIKES: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "frozen briefly": _freeze,
    "frozen for long": _freeze,
    "interrupted": _interrupt,
}
