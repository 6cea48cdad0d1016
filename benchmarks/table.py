"""The results of one case: as text, as a Markdown table, as a bar chart, and raw."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.bounds import Bound

_ROW, _LABEL, _BARS, _NUMBERS = 26, 300, 420, 90  # pixels
_OURS, _OTHERS = "#c2410c", "#94a3b8"


@dataclass(frozen=True)
class Table:
    """One case.

    Attributes:
        slug: for file names.
        title: what was measured, and where.
        seconds: of every round, by way; the rounds of all ways were interleaved.
        notes: what else there is to say of a way, by way.
        bounds: what is promised.
    """

    slug: str
    title: str
    seconds: Mapping[str, Sequence[float]]
    notes: Mapping[str, str] = field(default_factory=dict)
    bounds: Sequence[Bound] = ()

    def show(self, directory: Path | None) -> None:
        """Print it; also write ``<slug>.md``, ``.svg`` and ``.json`` into a directory."""
        print(self)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{self.slug}.md").write_text(self.markdown())
            (directory / f"{self.slug}.svg").write_text(self.chart())
            (directory / f"{self.slug}.json").write_text(self.raw())

    def __str__(self) -> str:
        """As text."""
        width = max(map(len, self.seconds))
        rows = [f"  {name:{width}} {_spread(values):>28}  {self._note(name)}" for name, values in self.seconds.items()]
        return "\n".join([f"\n{self.title}", *map(str.rstrip, rows), *(f"  {line}" for line in self.ratios())])

    def ratios(self) -> list[str]:
        """Return a line for each bound: the median of the rounds' own ratios.

        What disturbs a round disturbs both of its ways.
        """
        lines = []
        for bound in self.bounds:
            if bound.above not in self.seconds or bound.below not in self.seconds:
                continue  # not installed
            pairs = zip(self.seconds[bound.above], self.seconds[bound.below], strict=True)
            ratios = [above / below for above, below in pairs]
            ratio = statistics.median(ratios)
            spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
            lines.append(f"{bound.above} : {bound.below} = {ratio:.2f} {spread}{bound.verdict(ratio)}")
        return lines

    def markdown(self) -> str:
        """As a table, with the ratios below."""
        rows = [f"| {name} | {_spread(values)} | {self._note(name)} |" for name, values in self.seconds.items()]
        ratios = [f"- {line}" for line in self.ratios()]
        return "\n".join([self.title, "", "| | seconds | |", "|---|---|---|", *rows, "", *ratios, ""])

    def chart(self) -> str:
        """As SVG: a bar for each way."""
        medians = {name: statistics.median(values) for name, values in self.seconds.items()}
        scale = _BARS / max(medians.values())
        height = _ROW * (len(medians) + 2)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _BARS + _NUMBERS}" height="{height}" '
            'font-family="sans-serif" font-size="13">',
            f'<text x="8" y="18" font-weight="bold">{escape(self.title)}</text>',
        ]
        for number, (name, seconds) in enumerate(medians.items(), start=1):
            top = _ROW * number + 8
            colour = _OURS if name.startswith("rankload") else _OTHERS
            parts += [
                f'<text x="{_LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{_LABEL}" y="{top}" width="{max(1.0, seconds * scale):.1f}" height="20" fill="{colour}"/>',
                f'<text x="{_LABEL + seconds * scale + 6:.1f}" y="{top + 15}">{seconds:.3g} s</text>',
            ]
        return "\n".join([*parts, "</svg>", ""])

    def raw(self) -> str:
        """As JSON, every round."""
        return json.dumps({"title": self.title, "seconds": self.seconds, "notes": self.notes}, indent=1) + "\n"

    def _note(self, name: str) -> str:
        return self.notes.get(name, "")


def _spread(values: Sequence[float]) -> str:
    digits = 3 if max(values) >= 0.1 else 5
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
