"""Adapters: map the names in a checkpoint to the names in a module. Each function here returns an adapter.

    from rankload import adapt, dist_load_state_dict_from_url

    state_dict = dist_load_state_dict_from_url(url, adapt=[adapt.unwrap(), adapt.strip_prefix("module.")])
    model.load_state_dict(adapt.match_shapes(model)(state_dict), strict=False)

An adapter maps a dict to a new dict and leaves the old one unchanged. Only `to_dtype` copies tensors. Adapters work on
any dict of tensors; all but `to_dtype` also work on the ``entries`` of an opened checkpoint. The ``_metadata`` of a
state dict follows the names. Keys that are no strings stay. No adapter is collective.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rankload._text import shown_key
from rankload.errors import ArgumentError, LoadError

Adapter = Callable[[Any], Any]

_logger = logging.getLogger("rankload")

#: Keys under which training scripts save the model: torch's tutorials, Lightning, timm, fairseq, detectron2.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")

#: Prefixes that DistributedDataParallel and torch.compile add to all names of the wrapped module.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_MAX_SHOWN = 20


def compose(*adapters: Adapter) -> Adapter:
    """Chain adapters, the first one first.

    Raises (the adapter):
        ArgumentError: one of the adapters returns None.
    """

    def composed(checkpoint: Any) -> Any:
        for adapter in adapters:
            checkpoint = adapter(checkpoint)
            if checkpoint is None:
                name = getattr(adapter, "__qualname__", type(adapter).__name__)
                raise ArgumentError(
                    f"adapt={name}: returned None; return the state dict, even if it was changed in place"
                )
        return checkpoint

    return _lazy(composed) if all(map(is_lazy, adapters)) else composed


def as_adapter(adapt: Adapter | Sequence[Adapter] | None) -> Adapter:
    """Return one adapter for the value of an ``adapt=`` argument: a function, a sequence of functions, or None.

    Raises:
        ArgumentError: the value is something else.
    """
    given = [] if adapt is None else [adapt] if callable(adapt) else adapt
    adapters = list(given) if isinstance(given, Iterable) else [given]
    if factory := next((one for one in adapters if one in _FACTORIES), None):
        name = factory.__name__
        raise ArgumentError(f"adapt=adapt.{name}: this function makes an adapter; call it: adapt.{name}(…)")
    if not all(map(callable, adapters)):
        raise ArgumentError(f"adapt={adapt!r}: expected a function of the checkpoint, or a sequence of them")
    return compose(*adapters)


def is_lazy(adapter: Adapter) -> bool:
    """Return whether an adapter also works on tensors that have not been read yet.

    All adapters of this module do. A function of the caller may look at the elements.
    """
    return getattr(adapter, "is_lazy", False)


def _lazy(adapter: Adapter) -> Adapter:
    adapter.is_lazy = True  # type: ignore[attr-defined]
    return adapter


def _of_dicts(name: str, adapter: Adapter) -> Adapter:
    """Return an adapter that rejects anything but a dict.

    Args:
        name: what the error message calls the adapter.
        adapter: gets dicts only.
    """

    def checked(checkpoint: Any) -> Any:
        if not isinstance(checkpoint, Mapping):
            raise LoadError(f"{name}: expected a checkpoint that is a dict, got a {type(checkpoint).__name__}")
        return adapter(checkpoint)

    return _lazy(checked)


def unwrap(key: str = "auto") -> Adapter:
    """Take the state dict out of a training checkpoint.

    Args:
        key: key of the state dict: ``"state_dict"``, ``"model"``, ``"model_state"``, … ``"auto"`` tries the usual keys;
            a checkpoint that has none of them, but has tensors itself, is returned unchanged. Name the key for the
            ``entries`` of an opened checkpoint, where ``{"model": {"weight": …}}`` is ``"model.weight"``.

    Raises (the adapter):
        LoadError: there is no state dict; the message lists the checkpoint's keys.
    """

    def unwrapped(checkpoint: Mapping[str, Any]) -> Any:
        for candidate in WRAPPERS if key == "auto" else (key,):
            inner = checkpoint.get(candidate)
            if isinstance(inner, Mapping):
                return inner
            if inner is not None and hasattr(inner, "state_dict"):  # a whole module was saved
                return inner.state_dict()
        if key == "auto" and any(map(_is_tensor, checkpoint.values())):
            return checkpoint
        if key != "auto" and (flat := _beneath(checkpoint, key)):
            return flat
        keys = ", ".join(shown_key(name) for name in list(checkpoint)[:_MAX_SHOWN])
        tried = (
            f"under {', '.join(WRAPPERS)}; name its key: adapt=adapt.unwrap('…')" if key == "auto" else f"under {key!r}"
        )
        raise LoadError(f"unwrap({key!r}): found no state dict {tried}; the checkpoint has {keys or 'nothing'}")

    return _of_dicts(f"unwrap({key!r})", unwrapped)


def strip_prefix(*prefixes: str) -> Adapter:
    """Remove prefixes such as ``"module."`` or ``"_orig_mod."`` from all names that begin with them, in this order."""

    def stripped(name: str) -> str:
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        return name

    return _renaming("strip_prefix", stripped)


def add_prefix(prefix: str) -> Adapter:
    """Add a prefix to every name."""
    return _renaming("add_prefix", lambda name: prefix + name)


def rename(pattern: str, replacement: str) -> Adapter:
    r"""Replace a regular expression in every name, as `re.sub` does: ``rename(r"^backbone\.", "encoder.")``."""
    compiled = _compiled(pattern)
    try:
        compiled.sub(replacement, "")
    except (re.error, IndexError, TypeError) as error:
        raise ArgumentError(f"rename({pattern!r}, {replacement!r}): invalid replacement: {error}") from None
    return _renaming("rename", lambda name: compiled.sub(replacement, name))


def drop(*patterns: str) -> Adapter:
    r"""Drop all tensors whose names match one of the regular expressions (`re.search`): ``drop(r"^head\.")``."""
    compiled = [_compiled(pattern) for pattern in patterns]
    return _filtering("drop", lambda name: not any(pattern.search(name) for pattern in compiled))


def keep(*patterns: str) -> Adapter:
    """Keep only tensors whose names match one of the regular expressions (`re.search`)."""
    compiled = [_compiled(pattern) for pattern in patterns]
    return _filtering("keep", lambda name: any(pattern.search(name) for pattern in compiled))


def match_shapes(module: Any) -> Adapter:
    """Drop tensors whose shape differs from the module's tensor of the same name, and log them.

    Names that the module does not have stay: ``strict`` decides whether they matter.

    Args:
        module: an ``nn.Module``, wrapped (DistributedDataParallel, torch.compile) or not, or its state dict.
    """

    def matched(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        own = module if isinstance(module, Mapping) else _state_dict_of(module)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if _is_tensor(tensor)}
        unfit = {
            name: f"{name} {list(tensor.shape)}, not {list(shapes[name])}"
            for name, tensor in state_dict.items()
            if name in shapes and _is_tensor(tensor) and tuple(tensor.shape) != shapes[name]
        }
        if unfit:
            more = f" and {len(unfit) - _MAX_SHOWN} more" if len(unfit) > _MAX_SHOWN else ""
            _logger.warning("dropped for their shapes: %s%s", "; ".join([*unfit.values()][:_MAX_SHOWN]), more)
        return _kept(state_dict, (name for name in state_dict if name not in unfit))

    return _of_dicts("match_shapes", matched)


def to_dtype(dtype: Any) -> Adapter:
    """Convert floating-point tensors to a ``torch.dtype``; integers, such as batch norm's counters, stay.

    Tied tensors stay tied. Parameters stay parameters, and ``requires_grad`` is kept.

    Args:
        dtype: a ``torch.dtype`` such as ``torch.bfloat16``, or its name: ``"bfloat16"``.

    Raises (the adapter):
        ArgumentError: torch has no dtype of that name.
    """

    def converted(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        wanted = _dtype_of(dtype)
        floating = {id(value): value for value in state_dict.values() if _is_floating(value)}
        made = {number: _converted(value, wanted) for number, value in floating.items()}
        return _like(state_dict, ((name, made.get(id(value), value)) for name, value in state_dict.items()))

    return _of_dicts("to_dtype", converted)


def _dtype_of(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    torch = sys.modules["torch"]  # there are tensors
    found = getattr(torch, given, None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"to_dtype({given!r}): torch has no dtype of this name; expected bfloat16, float32, …")
    return found


def _converted(value: Any, dtype: Any) -> Any:
    """Return a tensor or lazy tensor with another dtype, as a leaf: autograd would keep the old tensor alive."""
    torch = sys.modules["torch"]  # already imported, for the caller has a dtype; `rankload prefetch` must not import it
    if value.dtype == dtype or not isinstance(value, torch.Tensor):
        return value.to(dtype)
    result = value.detach().to(dtype)
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(result, value.requires_grad)
    return result.requires_grad_(value.requires_grad)


def _renaming(what: str, rename_one: Callable[[str], str]) -> Adapter:
    def new_name(name: Any) -> Any:
        return rename_one(name) if isinstance(name, str) else name

    def renamed(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        sources: dict[str, str] = {}
        for name in state_dict:
            if (other := sources.setdefault(new_name(name), name)) != name:
                raise LoadError(f"{other!r} and {name!r} would both be named {new_name(name)!r}")
        result = _like(state_dict, ((name, state_dict[source]) for name, source in sources.items()))
        metadata = getattr(state_dict, "_metadata", None)
        if metadata is not None and isinstance(result, OrderedDict):  # a plain dict has no attributes
            # the keys of _metadata are modules: prefixes of names, without the dot
            pairs = ((new_name(f"{key}.").rstrip("."), version) for key, version in metadata.items())
            result._metadata = _like(metadata, pairs)  # type: ignore[attr-defined]
        return result

    return _of_dicts(what, renamed)


def _filtering(what: str, is_wanted: Callable[[str], bool]) -> Adapter:
    def filtered(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        return _kept(state_dict, (name for name in state_dict if not isinstance(name, str) or is_wanted(name)))

    return _of_dicts(what, filtered)


def _kept(state_dict: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    return _like(state_dict, ((name, state_dict[name]) for name in names))


def _like(state_dict: Mapping[str, Any], pairs: Iterable[tuple[str, Any]]) -> Mapping[str, Any]:
    """Return a dict of the pairs that load_state_dict treats like the old one: same kind, same ``_metadata``."""
    if not isinstance(state_dict, OrderedDict):
        return dict(pairs)
    result = OrderedDict(pairs)
    if (metadata := getattr(state_dict, "_metadata", None)) is not None:
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _beneath(checkpoint: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the entries below a key of an index, which joins the keys of nested dicts with dots."""
    prefix = f"{key}."
    names = [name for name in checkpoint if isinstance(name, str) and name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint[name] for name in names}


def _state_dict_of(module: Any) -> dict[str, Any]:
    """Return a module's tensors by name, both with and without the prefixes of its wrappers."""
    own: dict[str, Any] = dict(module.state_dict())
    found = {**own}
    while own and (prefixes := [one for one in _WRAPPER_PREFIXES if all(name.startswith(one) for name in own)]):
        own = {name.removeprefix(prefixes[0]): tensor for name, tensor in own.items()}
        found.update(own)
    return found


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_floating(value: Any) -> bool:
    return _is_tensor(value) and hasattr(value, "is_floating_point") and bool(value.is_floating_point())


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"{pattern!r} is not a regular expression: {error}") from None


_FACTORIES: tuple[object, ...] = (unwrap, strip_prefix, add_prefix, rename, drop, keep, match_shapes, to_dtype)
