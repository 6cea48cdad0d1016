"""Agree at the start of a call: which ranks have made the call, and whether all passed the same arguments."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from rankload._coordination.disagreement import advice_on, describe_disagreement
from rankload._coordination.store import RankStore
from rankload._types import Identity
from rankload.errors import ArgumentMismatchError

_KEY = "arrived"

#: Least time between two reads of the counter. Rank 0 asks once for each absent rank, several times in a row.
_LOOK_SECONDS = 0.2


class Agreement:
    """Agreement by one store operation per rank, on one counter.

    Each rank adds one, and a digest of its arguments in the higher bits. If all ranks so far agree, the sum is this
    rank's own summand times their number. Otherwise at least the first rank that differs notices, and compares its
    arguments with those of the first rank to arrive. That first rank publishes its arguments only in a call that takes
    longer, with its first heartbeat.

    The count also distinguishes a rank that was killed before its first heartbeat from one that has not arrived yet.

    Attributes:
        have_all_come: whether every rank is known to have made the call.
    """

    def __init__(self, store: RankStore, key: Callable[[str], str], identity: Identity, call: int) -> None:
        self._store, self._key, self._identity, self._call = store, key, identity, call
        self._count_bits = identity.world_size.bit_length()
        self._to_publish: dict[str, Any] | None = None
        self._publishing = threading.Lock()
        self._looked_at = -_LOOK_SECONDS
        self._mine: dict[str, Any] = {}
        self.have_all_come = False

    def enter(self, arguments: dict[str, Any]) -> bool:
        """Count this rank in; return whether its arguments agree with those of all ranks that came before."""
        self._mine = {"rank": self._identity.rank, "host": self._identity.host, "arguments": arguments}
        digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).digest()
        # so the sum of world_size digests and the count fit into a signed 64-bit integer
        digest_bits = 62 - 2 * self._count_bits
        own = 1 + ((int.from_bytes(digest[:8], "big") >> (64 - digest_bits)) << self._count_bits)
        total = self._store.add(self._key(_KEY), own)
        count = self._count(total)
        if count == 1:
            self._to_publish = self._mine
        return total == count * own

    def compare(self, first: dict[str, Any]) -> None:
        """Compare this rank's arguments with those of the first rank to arrive.

        Args:
            first: rank, host and arguments of the first rank, as `support` published them.

        Raises:
            ArgumentMismatchError: they differ.
        """
        mine, rank = self._mine["arguments"], self._identity.rank
        if details := describe_disagreement(first["arguments"], first["rank"], mine, rank):
            raise ArgumentMismatchError(
                f"ranks disagree on the arguments of call {self._call} ({details}): every rank must make the "
                f"same calls in the same order{advice_on(first['arguments'], mine)}",
                first_rank=first["rank"],
                other_rank=rank,
            )

    def support(self) -> None:
        """Publish this rank's arguments for comparison if this rank was the first to arrive."""
        with self._publishing:
            if self._to_publish is not None:
                self._store.set(self._key("arguments"), json.dumps(self._to_publish))
                self._to_publish = None

    def look(self) -> bool:
        """Return whether all ranks have made the call, as of the last read of the counter."""
        if not self.have_all_come and time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self.have_all_come = self._count(self._store.add(self._key(_KEY), 0)) == self._identity.world_size
        return self.have_all_come

    def _count(self, total: int) -> int:
        return total & ((1 << self._count_bits) - 1)
