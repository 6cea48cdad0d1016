"""What a job of the demo came to: plain records that cross from the ranks to the table."""

import dataclasses
import json
from dataclasses import dataclass

from demo.origin import Served


@dataclass(frozen=True)
class RankReport:
    """One rank's measurements.

    Attributes:
        rank: Its global rank.
        downloads: Whether it connected to the origin during the load call.
        device: Where the model ran, or where the tensors lie when there is no model.
        seconds: Duration of the load call.
        held_bytes: Growth of this process's memory over the load call, while every rank held its weights.
        memory_kind: ``"PSS"`` or ``"RSS"``.
        weight_bytes: Size of the tensors that the call returned.
        fingerprint: Of the weights.
        pitch_hz: What the model heard in a 440 Hz tone; ``None`` without a model.
    """

    rank: int
    downloads: bool
    device: str
    seconds: float
    held_bytes: int
    memory_kind: str
    weight_bytes: int
    fingerprint: str
    pitch_hz: float | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        return cls(**json.loads(text))


@dataclass(frozen=True)
class JobReport:
    """One way's job: its ranks in order, and what the origin served; ``None`` for an origin not our own."""

    way: str
    ranks: list[RankReport]
    served: Served | None

    @property
    def slowest_seconds(self) -> float:
        return max(rank.seconds for rank in self.ranks)

    @property
    def held_bytes(self) -> int:
        return sum(rank.held_bytes for rank in self.ranks)

    @property
    def downloading_ranks(self) -> int:
        return sum(rank.downloads for rank in self.ranks)


class JobFailed(RuntimeError):
    """A job ended without a report from every rank; the message is the cause, as told by the ranks."""
