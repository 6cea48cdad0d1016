"""Numbers that can be tuned, read from ``RANKLOAD_*`` environment variables at each call.

Every one has a default that is right for a large cluster. Set them alike on all ranks.
"""

from __future__ import annotations

import os
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
        liveness_seconds: a rank whose heartbeat is silent for so long was killed or is frozen.
        progress_seconds: deadline on no progress: no byte, no new phase (the ``timeout=`` argument wins).
        connect_seconds: deadline for one connection attempt to the origin.
        heartbeat_seconds: interval between a rank's signs of life in a call that takes longer.
        report_seconds: interval between log lines of a node that waits, and between progress lines.
        lease_seconds: lease between jobs: a holder that is silent for so long may be taken over.
        visibility_seconds: how long a published file may stay invisible on another node. Linux NFS clients
            keep negative name entries for up to 60 s (``acdirmax``, nfs(5)).
        stall_seconds: a connection on which no byte comes for so long is given up, and the range asked for anew.
        retries: how often a request is repeated when it fails and next to nothing (64 KiB) has come meanwhile.
        backoff_seconds: pause before the first repetition; it doubles with each.
        retry_after_seconds: longest pause that an origin can ask for with Retry-After.
        minimum_bytes_per_second: a connection that is slower over ``stall_seconds`` is given up as well; 0: any rate
            will do.
        streams: most connections that one download uses at a time.
        chunk_bytes: a range that is asked for, and the unit of what a killed download keeps.
        whole_first: the first request asks for all that is missing, so that a URL may answer only once; others follow
            where several streams are faster. 0: it asks for ``chunk_bytes``, for a proxy that passes no answer on
            before it has all of it, or an origin that serves large files in ranges only.
        offline: no socket is opened; what is not cached is an error.
        refresh: a cached file's origin is asked whether it has another one now.
        hash_prefix_digits: fewest hex digits in a file name that ``check_hash=True`` takes for a hash prefix. Finding a
            file with a given prefix of 8 digits takes some 4 billion tries; torch.hub's own names have 8.
        max_bytes: the most that one call may download (the ``max_bytes=`` argument wins); 0: no limit.
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

    @property
    def lease_heartbeat_seconds(self) -> float:
        """A third of the lease: two refreshes may be lost before a peer takes over."""
        return self.lease_seconds / 3

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings.

        Raises:
            ArgumentError: a variable does not hold a positive number (or, for ``offline``, a boolean).
        """
        environ = os.environ if environ is None else environ
        given = {field.name: environ[name] for field in fields(cls) if (name := variable(field.name)) in environ}
        values: dict[str, Any] = {name: _parse(name, text) for name, text in given.items()}
        return cls(**values)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def misspelt(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are no setting but look like one, and that one's variable.

    Others may begin so, too: a job script's own.
    """
    known = [MODEL_DIR_VARIABLE, *(variable(field.name) for field in fields(Settings))]
    unknown = sorted(name for name in environ if name.startswith(_PREFIX) and name not in known)
    return {name: close[0] for name in unknown if (close := get_close_matches(name, known, 1, _LIKENESS))}


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

#: The cache directory where none is passed. A path, and each node's own: it need not be the same on all ranks.
MODEL_DIR_VARIABLE = "RANKLOAD_MODEL_DIR"

#: Of 1, what two names have in common at the least (difflib's ratio) for one to be a slip of the other.
_LIKENESS = 0.85

_KINDS = {field.name: str(field.type) for field in fields(Settings)}

_MAX_DIGITS = 18

#: Whole numbers may be as small as this; 1 where it is not said.
_MIN_VALUE = {"retries": 0, "minimum_bytes_per_second": 0, "max_bytes": 0}
