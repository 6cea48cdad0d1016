"""Describe the mismatch between a checkpoint and a module, with advice. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rankload._text import MAX_SHOWN_NAME_LENGTH, cut, printable

_MAX_SHOWN = 20


def describe_mismatch(
    missing: Sequence[str], unexpected: Sequence[str], unfit: Sequence[str], content: Mapping[str, Any]
) -> str:
    """Return the text for an error message.

    Args:
        missing: names that only the module has.
        unexpected: names that only the checkpoint has.
        unfit: one sentence for each tensor that both have, but that does not fit.
        content: content of the checkpoint after ``adapt``, for the advice.
    """
    lines = [
        _listed("do not fit", unfit),
        _listed("missing in the checkpoint", missing, on_one_line=True),
        _listed("not in the module", unexpected, on_one_line=True),
        _advice(missing, unexpected, content),
        _advice_on_shapes(unfit),
    ]
    return "\n".join(line for line in lines if line)


def _listed(what: str, items: Sequence[str], *, on_one_line: bool = False) -> str:
    if not items:
        return ""
    # escape names: a name that contains a line break must not look like two names
    shown = [printable(cut(item, 2 * MAX_SHOWN_NAME_LENGTH)) for item in items[:_MAX_SHOWN]]
    if len(items) > _MAX_SHOWN:
        shown.append(f"and {len(items) - _MAX_SHOWN} more")
    head = f"  {len(items)} {what}:"
    return f"{head} {', '.join(shown)}" if on_one_line else "\n    ".join([head, *shown])


def _advice(missing: Sequence[str], unexpected: Sequence[str], content: Mapping[str, Any]) -> str:
    for wrapper, inner in content.items():
        if not isinstance(inner, Mapping):
            continue
        names = [name for name in inner if isinstance(name, str)]
        advice = f"pass adapt=adapt.unwrap({wrapper!r})"
        if any(name in inner for name in missing):
            return f"  The checkpoint has some of these names under {wrapper!r}: {advice}"
        if prefix := _common_prefix(missing, names):
            return (
                f"  The checkpoint has some of these names under {wrapper!r}, with a prefix: pass "
                f"adapt=[adapt.unwrap({wrapper!r}), adapt.strip_prefix({prefix!r})]"
            )
    if prefix := _common_prefix(missing, unexpected):
        return f"  Did you mean adapt=adapt.strip_prefix({prefix!r})?"
    if prefix := _common_prefix(unexpected, missing):
        return f"  Did you mean adapt=adapt.add_prefix({prefix!r})?"
    return ""


def _advice_on_shapes(unfit: Sequence[str]) -> str:
    if not any(sentence.startswith("size mismatch for ") for sentence in unfit):  # torch's own words
        return ""
    return "  To leave out tensors of another shape: adapt=adapt.match_shapes(module), strict=False"


def _common_prefix(short: Sequence[str], long: Sequence[str]) -> str:
    """Return the most frequent prefix that turns short names into long ones; empty if it is rare."""
    wanted = set(short)
    longest = max(map(len, wanted), default=0)
    found: Counter[str] = Counter()
    for name in long:
        # skip dots before which the rest is longer than any short name: a name may have any number of dots
        dots = (i for i in range(max(0, len(name) - 1 - longest), len(name)) if name[i] == ".")
        found.update(name[: dot + 1] for dot in dots if name[dot + 1 :] in wanted)
    if not found:
        return ""
    prefix, times = found.most_common(1)[0]
    return prefix if 2 * times > min(len(short), len(long)) else ""
