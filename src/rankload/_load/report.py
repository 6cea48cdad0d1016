"""The report of a load into a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankload._load.delivery.strategy import DeliveryStrategy
from rankload._load.module.remainder import Remainder
from rankload._text import MAX_SHOWN_NAME_LENGTH, cut
from rankload._types import FetchedFile
from rankload.errors import ArgumentError


@dataclass(frozen=True, repr=False)
class LoadReport:
    """The result of `dist_load_into`: what ``load_state_dict`` returns, and what the load took on this rank.

    It unpacks into ``missing_keys, unexpected_keys``.

    Attributes:
        missing_keys: names that the module has and the checkpoint lacks; only with ``strict=False``.
        unexpected_keys: names that the checkpoint has and the module lacks; only with ``strict=False``.
        path: the verified file on this node; None if the tensors came from another node.
        bytes_read: bytes of tensors that this rank read, mapped, or took out of a broadcast; with a gather, only the
            bytes of its own shares and of what no other rank holds.
        phases: seconds by phase: ``fetch``, ``check`` (until all ranks have checked), and ``fill``.
        fetch_reason: how the file got to this rank's node, and why in that way; empty if the tensors came from another
            node. For people: the words may change.
        delivery: delivery that was used: ``"read"``, ``"broadcast"`` or ``"gather"``.
        reason: why this delivery was used.
        left_on_meta: buffers that are still on the meta device, for no checkpoint contains them
            (``persistent=False``): the script has to compute them.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    path: Path | None
    bytes_read: int
    phases: Mapping[str, float]
    fetch_reason: str
    delivery: str
    reason: str
    left_on_meta: Sequence[str]
    _remainder: Remainder | None

    @classmethod
    def make(
        cls,
        keys: tuple[Sequence[str], Sequence[str]],
        strategy: DeliveryStrategy,
        file: FetchedFile | None,
        bytes_read: int,
        phases: Mapping[str, float],
        left_on_meta: Sequence[str],
        remainder: Remainder | None,
    ) -> LoadReport:
        """Build a report: ``keys`` are the missing and the unexpected names, ``file`` is this node's."""
        return cls(
            list(keys[0]),
            list(keys[1]),
            strategy.path,
            bytes_read,
            dict(phases),
            file.reason if file is not None else "",
            strategy.delivery,
            strategy.reason,
            tuple(left_on_meta),
            remainder,
        )

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))

    @property
    def remainder(self) -> Any:
        """The rest of a training checkpoint after a load into ``(module, optimizer)``: epoch, scheduler, random states.

        This is the result of torch.load, on the CPU and with its nesting, without the keys of the module's and the
        optimizer's state. Every rank has its own copy.

        Raises:
            UnsafePickleError: ``weights_only`` refused an object in the rest.
            LoadError: the rest could not be loaded for another reason.
            ArgumentError: the load was into a module alone.
        """
        if self._remainder is None:
            raise ArgumentError("report.remainder: not loaded; call dist_load_into((module, optimizer), …) to load it")
        if self._remainder.error is not None:
            raise self._remainder.error
        return self._remainder.content

    @property
    def seconds(self) -> float:
        """Seconds of all phases, without the wait for the verdict."""
        return sum(self.phases.values())

    def __repr__(self) -> str:
        fit = f"missing_keys={_cut_names(self.missing_keys)}, unexpected_keys={_cut_names(self.unexpected_keys)}"
        keys = fit if self.missing_keys or self.unexpected_keys else "all keys matched"
        return f"<LoadReport {keys}, {self.bytes_read} bytes in {self.seconds:.3f} s>"


def _cut_names(names: Sequence[str]) -> list[str]:
    return [cut(name, MAX_SHOWN_NAME_LENGTH) for name in names]
