"""From the names in a checkpoint to the names in a module: small functions that make functions.

    from rankload import adapt, dist_load_state_dict_from_url

    state_dict = dist_load_state_dict_from_url(url, adapt=[adapt.unwrap(), adapt.strip_prefix("module.")])
    model.load_state_dict(adapt.match_shapes(model)(state_dict), strict=False)

Each maps a dict to a new one and leaves the old one as it is; no tensor is copied but by `to_dtype`. They work on any
dict of tensors, on the ``entries`` of an opened checkpoint (all but `to_dtype`), and on state dicts whose ``_metadata``
has to follow the names; keys that are no names stay. None is collective.
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

#: Under which keys training scripts save the model: torch's tutorials, Lightning, timm, fairseq, detectron2.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")

#: What DistributedDataParallel and torch.compile put before all names of the module within.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_MAX_SHOWN = 20


def compose(*adapters: Adapter) -> Adapter:
    """Apply several, the first one first.

    Raises (the function):
        ArgumentError: one of them returns None.
    """

    def composed(checkpoint: Any) -> Any:
        for adapter in adapters:
            checkpoint = adapter(checkpoint)
            if checkpoint is None:
                name = getattr(adapter, "__qualname__", type(adapter).__name__)
                raise ArgumentError(
                    f"adapt={name}: it has returned None: return the state dict, changed in place or not"
                )
        return checkpoint

    return _lazy(composed) if all(map(is_lazy, adapters)) else composed


def as_adapter(adapt: Adapter | Sequence[Adapter] | None) -> Adapter:
    """Return what ``adapt=`` arguments mean: a function, several, or none.

    Raises:
        ArgumentError: something else.
    """
    given = [] if adapt is None else [adapt] if callable(adapt) else adapt
    adapters = list(given) if isinstance(given, Iterable) else [given]
    if factory := next((one for one in adapters if one in _FACTORIES), None):
        name = factory.__name__
        raise ArgumentError(f"adapt=adapt.{name}: it makes an adapter, and has to be called: adapt.{name}(…)")
    if not all(map(callable, adapters)):
        raise ArgumentError(f"adapt={adapt!r}: expected a function of the checkpoint, or a sequence of them")
    return compose(*adapters)


def is_lazy(adapter: Adapter) -> bool:
    """Say whether an adapter works on tensors that are not read yet as on tensors, so that it costs no reading.

    Those of this module do; a function of the caller's may do anything with the tensors.
    """
    return getattr(adapter, "is_lazy", False)


def _lazy(adapter: Adapter) -> Adapter:
    adapter.is_lazy = True  # type: ignore[attr-defined]
    return adapter


def _of_dicts(name: str, adapter: Adapter) -> Adapter:
    """Return an adapter that gets dicts only, with the name that messages call it."""

    def checked(checkpoint: Any) -> Any:
        if not isinstance(checkpoint, Mapping):
            raise LoadError(f"{name}: the checkpoint is no dict but a {type(checkpoint).__name__}")
        return adapter(checkpoint)

    return _lazy(checked)


def unwrap(key: str = "auto") -> Adapter:
    """Take the state dict out of a training checkpoint.

    Args:
        key: where it is: ``"state_dict"``, ``"model"``, ``"model_state"``, … ``"auto"`` looks under the usual ones, and
            returns a checkpoint that has none of them, but tensors itself, as it is. Of the ``entries`` of an opened
            checkpoint, where ``{"model": {"weight": …}}`` is ``"model.weight"``, name the key.

    Raises (the function):
        LoadError: there is none; the message tells the keys that there are.
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
        raise LoadError(f"unwrap({key!r}): no state dict is there; the checkpoint has {keys or 'nothing'}")

    return _of_dicts(f"unwrap({key!r})", unwrapped)


def strip_prefix(*prefixes: str) -> Adapter:
    """Take each of the prefixes, in this order, off the names that begin with it: ``"module."``, ``"_orig_mod."``."""

    def stripped(name: str) -> str:
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        return name

    return _renaming("strip_prefix", stripped)


def add_prefix(prefix: str) -> Adapter:
    """Put a prefix before every name."""
    return _renaming("add_prefix", lambda name: prefix + name)


def rename(pattern: str, replacement: str) -> Adapter:
    r"""Replace a regular expression in every name, as `re.sub` does: ``rename(r"^backbone\.", "encoder.")``."""
    compiled = _compiled(pattern)
    try:
        compiled.sub(replacement, "")
    except (re.error, IndexError, TypeError) as error:
        raise ArgumentError(f"rename({pattern!r}, {replacement!r}): no replacement: {error}") from None
    return _renaming("rename", lambda name: compiled.sub(replacement, name))


def drop(*patterns: str) -> Adapter:
    r"""Leave out the tensors in whose names one of the regular expressions is found: ``drop(r"^head\.")``."""
    compiled = [_compiled(pattern) for pattern in patterns]
    return _filtering("drop", lambda name: not any(pattern.search(name) for pattern in compiled))


def keep(*patterns: str) -> Adapter:
    """Leave out all tensors but those in whose names one of the regular expressions is found."""
    compiled = [_compiled(pattern) for pattern in patterns]
    return _filtering("keep", lambda name: any(pattern.search(name) for pattern in compiled))


def match_shapes(module: Any) -> Adapter:
    """Leave out what has another shape than the module's tensor of that name, and log what that was.

    Names that the module does not have stay: whether they matter is for ``strict`` to say.

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
            _logger.warning("left out for their shapes: %s%s", "; ".join([*unfit.values()][:_MAX_SHOWN]), more)
        return _kept(state_dict, (name for name in state_dict if name not in unfit))

    return _of_dicts("match_shapes", matched)


def to_dtype(dtype: Any) -> Adapter:
    """Convert floating-point tensors to a ``torch.dtype``; integers, such as batch norm's counters, stay.

    A tensor under several names stays one; parameters stay parameters, and what requires gradients still does.
    """

    def converted(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        floating = {id(value): value for value in state_dict.values() if _is_floating(value)}
        made = {number: _converted(value, dtype) for number, value in floating.items()}
        return _like(state_dict, ((name, made.get(id(value), value)) for name, value in state_dict.items()))

    return _of_dicts("to_dtype", converted)


def _converted(value: Any, dtype: Any) -> Any:
    """Return a tensor, or a stand-in for one, with another dtype; a leaf, or it would keep the old one alive."""
    torch = sys.modules["torch"]  # a dtype is here; an import would have `rankload prefetch` import it
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
            # its keys are modules: prefixes of names, without the dot
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
    """Make a dict that load_state_dict treats as the old one: with its ``_metadata``, if it has any."""
    if not isinstance(state_dict, OrderedDict):
        return dict(pairs)
    result = OrderedDict(pairs)
    if (metadata := getattr(state_dict, "_metadata", None)) is not None:
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _beneath(checkpoint: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what an index has under a key: there, the keys of nested dicts are joined with dots."""
    prefix = f"{key}."
    names = [name for name in checkpoint if isinstance(name, str) and name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint[name] for name in names}


def _state_dict_of(module: Any) -> dict[str, Any]:
    """Return a module's tensors by their names, and by those that they have without its wrappers."""
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
        raise ArgumentError(f"{pattern!r} is no regular expression: {error}") from None


_FACTORIES: tuple[object, ...] = (unwrap, strip_prefix, add_prefix, rename, drop, keep, match_shapes, to_dtype)
