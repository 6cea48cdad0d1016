"""Walk and replace the leaves of nested containers. Objects are leaves."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_DICTS = (dict, OrderedDict, Counter, defaultdict)


def with_leaves(content: Any, stand_in: Callable[[Any], Any], made: dict[int, Any] | None = None) -> Any:
    """Return nested content with replaced leaves. Dicts keep their types and attributes, such as module versions.

    Args:
        content: nested dicts, lists and tuples; they may contain themselves.
        stand_in: returns the replacement of a leaf.
        made: results for containers so far, by id: a container may occur many times.
    """
    made = {} if made is None else made
    if id(content) in made:
        return made[id(content)]
    result: Any
    if type(content) in _DICTS:
        result = made[id(content)] = _empty_like(content)
        for name, value in content.items():
            result[name] = with_leaves(value, stand_in, made)
        return result
    if type(content) is list:
        result = made[id(content)] = []
        result.extend(with_leaves(value, stand_in, made) for value in content)
        return result
    if type(content) is tuple:
        result = made[id(content)] = tuple(with_leaves(value, stand_in, made) for value in content)
        return result
    return stand_in(content)


def leaves(content: Any) -> Iterator[Any]:
    """Yield the leaves of nested containers. Each container is walked once."""
    rest, seen = [content], set[int]()
    while rest:
        value = rest.pop()
        if not isinstance(value, (Mapping, list, tuple)):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, Mapping) else value)


def _empty_like(content: Any) -> Any:
    result = defaultdict(content.default_factory) if type(content) is defaultdict else type(content)()
    if hasattr(content, "__dict__"):
        vars(result).update(vars(content))
    return result
