"""The pickle of a state dict, as torch.save writes it: read by the standard unpickler, in a fifth of the time.

Only what patterns match from the first byte to the last is handed to it. What a crafted file could do to it (see
`pickle_stack`) does not fit into them: names are those of tensors, storages and dicts; keys are texts; the memo has at
most 2^19 places; attributes are set of dicts alone. All other pickles are `PickleMachine`'s, which would make the
same of these.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from rankload._checkpoint.pickle_values import Builder, GlobalName, NotUnderstoodError

#: Such a pickle has about 100 bytes a tensor.
_MOST_BYTES = 1 << 23

_PUT = rb"(?:q.|r..[\0-\x07]\0)"
_GET = rb"(?:h.|j....)"
_INTEGER = rb"(?:K.|M..|J....)"
_TEXT = rb"X(.)\0\0\0([\w.:/-]*)" + _PUT  # its length in bytes, and itself
_ORDERED_DICT = rb"(?:ccollections\nOrderedDict\n%b|%b)\)R%b" % (_PUT, _GET, _PUT)
_SIZES = rb"(?:\)|(?:%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,64}t)%b)" % (*(_INTEGER,) * 4, _PUT)

_STORAGE = rb"\((?:X\x07\0\0\0storage%b|%b)(?:ctorch\n[A-Za-z0-9]+Storage\n%b|%b)(?:%b|%b)(?:%b|%b)%bt%bQ" % (
    *(_PUT, _GET),  # "storage"
    *(_PUT, _GET),  # the class
    *(_TEXT, _GET),  # the key
    *(_TEXT, _GET),  # the location
    *(_INTEGER, _PUT),  # the number of elements; the tuple of all these
)
_TENSOR = rb"(?:ctorch\._utils\n_rebuild_tensor_v2\n%b|%b)\(%b%b%b%b[\x88\x89]%bt%bR%b" % (
    *(_PUT, _GET),
    *(_STORAGE, _INTEGER, _SIZES, _SIZES),  # and offset, shape and strides
    _ORDERED_DICT,  # no hooks
    *(_PUT, _PUT),
)
_VERSION = rb"}%b(?:X\x07\0\0\0version%b|%b)K.s" % (_PUT, _PUT, _GET)  # of a module

#: A tensor with its name, or a module's version with the module's.
_ITEM = re.compile(rb"%b(?:%b|%b)" % (_TEXT, _TENSOR, _VERSION), re.DOTALL)
_TEXTS_PER_ITEM = 3

#: What stands before, between and behind items: they come by the thousand, and behind tensors there may be versions.
_BEGIN = re.compile(rb"\x80\x02(?:}%b|%b)\(" % (_PUT, _ORDERED_DICT), re.DOTALL)
_BETWEEN = re.compile(rb"|u\(|u}%bX\x09\0\0\0_metadata%b%b\(" % (_PUT, _PUT, _ORDERED_DICT), re.DOTALL)
_END = re.compile(rb"u(?:sb)?\.")

#: What the standard unpickler raises where an index into the memo has nothing behind it, or something else.
_UNLIKE = (NotUnderstoodError, pickle.UnpicklingError, LookupError, TypeError, AttributeError, ValueError)


def read_state_dict(
    content: bytes, builders: Mapping[GlobalName, Builder], load_persistent: Callable[[Any], Any]
) -> dict[str, Any] | None:
    """Return what `PickleMachine` makes of the same, exactly; None if the pickle is of another kind."""
    if not _is_state_dict(content):
        return None
    try:
        found: dict[str, Any] = _Unpickler(content, builders, load_persistent).load()
    except _UNLIKE:
        return None
    # a key out of the memo may be any value of these patterns: names of storages, shapes
    items = (*found.values(), *getattr(found, "_metadata", {}).values())
    return found if all(item.keys() == {"version"} for item in items if type(item) is dict) else None


def _is_state_dict(content: bytes) -> bool:
    if len(content) > _MOST_BYTES:
        return False
    parts = _ITEM.split(content)
    step = 1 + 2 * _TEXTS_PER_ITEM
    begin, *between, end = parts[::step] if len(parts) > 1 else (content, content)
    return bool(
        _BEGIN.fullmatch(begin)
        and all(map(_BETWEEN.fullmatch, between))
        and _END.fullmatch(end)
        and all(_have_their_lengths(parts[i::step], parts[i + 1 :: step]) for i in range(1, step, 2))
    )


def _have_their_lengths(lengths: list[bytes | None], texts: list[bytes | None]) -> bool:
    """Tell whether the patterns and the unpickler see the same end of each text."""
    found = zip(filter(None, lengths), (text for text in texts if text is not None), strict=True)
    return all(length[0] == len(text) for length, text in found)


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, content: bytes, builders: Mapping[GlobalName, Builder], load_persistent: Callable[[Any], Any]
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._builders, self._load_persistent = builders, load_persistent

    def persistent_load(self, persistent_id: Any) -> Any:
        return self._load_persistent(persistent_id)

    def find_class(self, module: str, name: str) -> Any:
        """Import nothing: `_ITEM` lets only a few names through."""
        function = GlobalName(module, name)
        if function == _ORDERED_DICT_NAME:
            return OrderedDict
        builder = self._builders.get(function)
        return function if builder is None else lambda *arguments: builder(arguments)


_ORDERED_DICT_NAME = GlobalName("collections", "OrderedDict")
