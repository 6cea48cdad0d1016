"""Tunable settings, read from ``RANKLOAD_*`` environment variables at each call.

Every default suits a large cluster. Set the same values on all ranks.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from rankload.errors import ArgumentError


@dataclass(frozen=True)
class Settings:
    """Deadlines and intervals in seconds, sizes in bytes. ``RANKLOAD_<NAME>`` overrides each.

    Attributes:
        arrival_seconds: how long ranks wait for a rank that has not made the call yet.
        liveness_seconds: silence of a heartbeat after which its rank counts as killed or frozen.
        progress_seconds: longest time without progress: no byte, no new phase (the ``timeout=`` argument wins).
        connect_seconds: deadline for one connection attempt to the origin.
        heartbeat_seconds: interval between two heartbeats of a rank in a call that takes longer.
        report_seconds: interval between log lines of a waiting node, and between progress lines.
        lease_seconds: silence of a lease's holder after which another job may take the lease over.
        visibility_seconds: how long a published file may stay invisible on another node. Linux NFS clients
            keep negative name entries for up to 60 s (``acdirmax``, nfs(5)).
        stall_seconds: time without a byte after which a connection is closed and its range is requested again.
        retries: how often a failing request is repeated while less than 64 KiB arrive between two failures.
        backoff_seconds: pause before the first retry; it doubles with each retry.
        retry_after_seconds: longest pause that an origin can ask for with Retry-After.
        minimum_bytes_per_second: slowest acceptable rate of a connection over ``stall_seconds``; a slower connection
            is closed as well. 0 accepts any rate.
        streams: most connections that one download opens at a time.
        chunk_bytes: size of one requested range, and the unit that survives a killed download.
        whole_first: the first request asks for all missing bytes, which suits URLs that answer only once. More
            requests follow if several streams are faster. 0 starts with ``chunk_bytes`` instead: for a proxy that
            buffers whole answers, or an origin that serves large files only in ranges.
        offline: open no socket; a file that is not cached is an error.
        refresh: ask the origin whether a cached file is still current.
        hash_prefix_digits: fewest hex digits in a file name that ``check_hash=True`` takes for a hash prefix. Finding a
            file with a given prefix of 8 digits takes some 4 billion tries; torch.hub's own names have 8.
        max_bytes: the most that one call may download (the ``max_bytes=`` argument wins); 0 for no limit.
        broadcast_over_group: with ``delivery="broadcast"``, send tensors for modules, and state dicts that all ranks
            put on accelerators, over the process group (NCCL), not over TCP. Every rank but the source then receives,
            also those that could read the source's file. Nobody has tried it on several GPUs yet.
    """

    arrival_seconds: float = 600.0
    liveness_seconds: float = 30.0
    progress_seconds: float = 120.0
    connect_seconds: float = 15.0
    heartbeat_seconds: float = 2.0
    report_seconds: float = 30.0
    lease_seconds: float = 30.0
    visibility_seconds: float = 90.0
    stall_seconds: float = 30.0
    retries: int = 5
    backoff_seconds: float = 1.0
    retry_after_seconds: float = 300.0
    minimum_bytes_per_second: int = 0
    streams: int = 16
    chunk_bytes: int = 8 << 20
    whole_first: bool = True
    offline: bool = False
    refresh: bool = False
    hash_prefix_digits: int = 8
    max_bytes: int = 0
    broadcast_over_group: bool = False

    @property
    def lease_heartbeat_seconds(self) -> float:
        """Interval between two refreshes of a lease: a third, so that two may be lost before a peer takes over."""
        return self.lease_seconds / 3

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from the environment.

        Raises:
            ArgumentError: a variable holds no valid value: a boolean, or a number that is large enough.
        """
        environ = os.environ if environ is None else environ
        given = {field.name: environ[name] for field in fields(cls) if (name := variable(field.name)) in environ}
        values: dict[str, Any] = {name: _parse(name, text) for name, text in given.items()}
        return cls(**values)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def misspelt(environ: Mapping[str, str]) -> dict[str, str]:
    """Map each misspelt variable to the variable that it resembles.

    Unknown variables that resemble none are left out: a job script may have ``RANKLOAD_`` variables of its own.
    """
    others = [MODEL_DIR_VARIABLE, TABLE_VARIABLE, GITHUB_MIRRORS_VARIABLE, PORTS_VARIABLE]
    known = [*others, *(variable(field.name) for field in fields(Settings))]
    unknown = sorted(name for name in environ if name.startswith(_PREFIX) and name not in known)
    return {name: close[0] for name in unknown if (close := get_close_matches(name, known, 1, _LIKENESS))}


def ports_to_try(environ: Mapping[str, str] = os.environ) -> list[int]:
    """Return the ports at which this process may listen, in random order; ``[0]`` for any that the kernel chooses.

    Raises:
        ArgumentError: ``RANKLOAD_PORTS`` is not a range.
    """
    text = environ.get(PORTS_VARIABLE, "").strip()
    if not text:
        return [0]
    first, dash, last = text.partition("-")
    ends = (first, last if dash else first)
    numbers = [int(end) for end in ends if end.strip().isdecimal() and len(end) <= _MAX_DIGITS]
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < 1 << 16:
        raise ArgumentError(f"{PORTS_VARIABLE}={text!r}: expected a range of ports, such as 29600-29699")
    ports = list(range(numbers[0], numbers[1] + 1))
    random.shuffle(ports)  # jobs that share a node do not all begin with the first
    return ports


def _parse(name: str, text: str) -> float | int | bool:
    kind = _KINDS[name]
    if kind == "bool":
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("", "0", "false", "no", "off"):
            return False
        raise ArgumentError(f"{variable(name)}={text!r}: expected 1 or 0")
    least = _MIN_VALUE.get(name, 1)
    if kind == "int":
        if text.strip().isdecimal() and len(text) <= _MAX_DIGITS and int(text) >= least:
            return int(text)
        raise ArgumentError(f"{variable(name)}={text!r}: expected a whole number, at least {least}")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise ArgumentError(f"{variable(name)}={text!r}: expected a positive number of seconds")
    return value


_PREFIX = "RANKLOAD_"

#: Environment variable with the cache directory, for calls that pass none. Its path may differ between nodes.
MODEL_DIR_VARIABLE = "RANKLOAD_MODEL_DIR"

#: Environment variable with the ports at which ranks may listen for one another: ``29600-29699``.
PORTS_VARIABLE = "RANKLOAD_PORTS"

#: Environment variable with the path of a table of named checkpoints.
TABLE_VARIABLE = "RANKLOAD_TABLE"

#: Name of such a table: in the working directory, and in a package that registers one.
TABLE_NAME = "rankload.toml"

#: Environment variable with mirrors of github.com for repositories: URL prefixes, separated by commas.
GITHUB_MIRRORS_VARIABLE = "RANKLOAD_GITHUB_MIRRORS"

#: Lowest similarity (difflib's ratio, 0 to 1) at which one name counts as a misspelling of another.
_LIKENESS = 0.85

_KINDS = {field.name: str(field.type) for field in fields(Settings)}

_MAX_DIGITS = 18

#: Smallest allowed whole numbers; 1 for settings that are not listed.
_MIN_VALUE = {"retries": 0, "minimum_bytes_per_second": 0, "max_bytes": 0}
