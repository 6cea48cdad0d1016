"""What is promised of the ratio of two ways."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A ratio of two ways, and what is promised of it."""

    above: str
    below: str
    at_most: float | None = None
    at_least: float | None = None

    def verdict(self, ratio: float) -> str:
        """In words; empty where nothing is promised."""
        if self.at_most is not None:
            return f", must be <= {self.at_most}: {'kept' if ratio <= self.at_most else 'NOT KEPT'}"
        if self.at_least is not None:
            return f", must be >= {self.at_least}: {'kept' if ratio >= self.at_least else 'NOT KEPT'}"
        return ""
