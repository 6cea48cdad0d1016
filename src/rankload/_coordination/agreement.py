"""Agree on the way into a call: who has come, and whether all made the same call."""

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

#: Rank 0 asks for each rank that it misses, several times in a row.
_LOOK_SECONDS = 0.2


class Agreement:
    """One operation a rank: each adds one, and a digest of its arguments in the bits above, to one counter.

    Where all so far agree, the sum is what this rank has added, times their number. Otherwise at least the first rank
    to differ sees it, and compares with the arguments of the first one to come. That one publishes them only in a call
    that lasts, with its first sign of life.

    The count tells a rank that was killed before its first sign of life from one that has not come yet.

    Attributes:
        have_all_come: whether this rank knows that every rank has made the call.
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
        """Say that this rank has come; return whether it agrees with all that have come before."""
        self._mine = {"rank": self._identity.rank, "host": self._identity.host, "arguments": arguments}
        digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).digest()
        # a sum of world_size digests fits into what a signed number of 64 bits has left
        digest_bits = 62 - 2 * self._count_bits
        own = 1 + ((int.from_bytes(digest[:8], "big") >> (64 - digest_bits)) << self._count_bits)
        total = self._store.add(self._key(_KEY), own)
        count = self._count(total)
        if count == 1:
            self._to_publish = self._mine
        return total == count * own

    def compare(self, first: dict[str, Any]) -> None:
        """Compare this rank's arguments with those of the first one to come.

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
        """Publish what others may want to compare with, if this rank was the first to come."""
        with self._publishing:
            if self._to_publish is not None:
                self._store.set(self._key("arguments"), json.dumps(self._to_publish))
                self._to_publish = None

    def look(self) -> bool:
        """Return whether all ranks have come, as of a moment ago."""
        if not self.have_all_come and time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self.have_all_come = self._count(self._store.add(self._key(_KEY), 0)) == self._identity.world_size
        return self.have_all_come

    def _count(self, total: int) -> int:
        return total & ((1 << self._count_bits) - 1)
