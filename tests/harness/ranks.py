"""Run a function in N real processes that look like a distributed job, and never wait for ever.

    def load(rank, url):
        return rankload.load_state_dict_from_url(url)

    def test_all_ranks_load(origin):
        results = run_ranks(load, 4, args=(origin.add("model.pth", content),))
        assert [result.value for result in results] == ...

``run_ranks`` returns when all ranks have ended, however they ended. ``start_ranks`` gives the test a
``RankGroup`` while they run: to stop, kill, hold back and release them one by one.
At the deadline the stacks of the ranks that hang go into the error, and all are killed.

Ranks are forked from one interpreter that has imported torch (see ``zygote``). What differs from a
process of their own: variables that torch reads when it is imported come too late, all ranks share one
hash seed, and they run atexit handlers, but do not tear the interpreter down unless a test uses the
fixture ``whole_exit``. Where that matters, use ``scripts.run_script`` or ``scripts.run_torchrun``.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.environments import Place, clean_environment, places, torch_variables, torchrun_variables
from harness.ports import reserved_port
from harness.rank import mark
from harness.rank_group import RankGroup
from harness.rank_results import RankError, RankFailed, RankResult, RanksTimedOut
from harness.waiting import wait_until

__all__ = [
    "AgentStore",
    "RankError",
    "RankFailed",
    "RankGroup",
    "RankResult",
    "RanksTimedOut",
    "agent_store",
    "run_ranks",
    "start_ranks",
    "wait_until",
]

Environment = str | Callable[[int], Mapping[str, str]]
RankEnvironment = Mapping[int, Mapping[str, str | None]] | Callable[[int], Mapping[str, str | None]]


def start_ranks(
    function: Callable[..., Any],
    world_size: int,
    *,
    env: Environment = "torchrun",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    nodes: int | Sequence[int] = 1,
    rank_env: RankEnvironment | None = None,
    store: AgentStore | None = None,
    held: Sequence[int] = (),
) -> RankGroup:
    """Starts ``function(rank, *args, **kwargs)`` in ``world_size`` processes.

    Args:
        function: At the top of a module; each process imports that module anew.
        env: ``"torchrun"`` (an agent hosts the store), ``"env"`` (the same variables set by hand: rank 0
            must host it), ``"none"`` (no variable of any launcher), or a function from rank to variables.
        nodes: How many hosts the variables speak of, or the number of ranks on each.
        rank_env: Variables of single ranks, over all others; ``None`` removes one.
        store: The agent's store, when it must outlive the job (a restart) or die before it.
        held: Ranks that do not start before ``RankGroup.release``.
    """
    resources = contextlib.ExitStack()
    with resources:
        port = _port(env, store, resources)
        environments = [_environment(place, env, rank_env, port) for place in places(world_size, nodes)]
        group = RankGroup(function, environments, args, kwargs or {}, held)
        group.keep(resources.pop_all())
    return group


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    timeout_seconds: float = 60,
    *,
    env: Environment = "torchrun",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    nodes: int | Sequence[int] = 1,
    rank_env: RankEnvironment | None = None,
    store: AgentStore | None = None,
) -> list[RankResult]:
    """Runs ``function(rank, *args, **kwargs)`` in ``world_size`` processes; see ``start_ranks``.

    Raises:
        RanksTimedOut: At the deadline, with every rank's stack; no process is left.
    """
    group = start_ranks(
        function, world_size, env=env, args=args, kwargs=kwargs, nodes=nodes, rank_env=rank_env, store=store
    )
    with group:
        return group.wait(timeout_seconds)


@dataclass(frozen=True)
class AgentStore:
    """A TCPStore in a process of its own, as torchrun's agent hosts it."""

    port: int
    _group: RankGroup = field(repr=False)

    def kill(self) -> None:
        """Takes the store away, as the death of the first node does."""
        self._group.kill(0)
        self._group.wait_for_end(0)


@contextlib.contextmanager
def agent_store() -> Iterator[AgentStore]:
    """Hosts a store until the block ends, for one job or for several after each other."""
    with start_ranks(_host_store, 1, env="none") as group:
        [port] = group.wait_for_mark("listening")
        yield AgentStore(port, group)


def _host_store(rank: int) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    mark("listening", store.port)
    signal.pause()  # until the group closes


def _port(env: Environment, store: AgentStore | None, resources: contextlib.ExitStack) -> int:
    if env == "torchrun":
        return (store or resources.enter_context(agent_store())).port
    assert store is None, 'a store goes with env="torchrun"'
    return resources.enter_context(reserved_port()) if env == "env" else 0


def _environment(place: Place, env: Environment, rank_env: RankEnvironment | None, port: int) -> dict[str, str]:
    if callable(env):
        variables = env(place.rank)
    else:
        variables = {"torchrun": torchrun_variables, "env": torch_variables, "none": lambda *_: {}}[env](place, port)
    own = rank_env(place.rank) if callable(rank_env) else (rank_env or {}).get(place.rank, {})
    merged = {**clean_environment(), **variables, **own}
    return {name: value for name, value in merged.items() if value is not None}
