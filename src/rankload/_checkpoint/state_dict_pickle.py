"""The pickle of a state dict, as torch.save writes it: read by the standard unpickler, in a third of the time.

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

from rankload._checkpoint.pickle_values import Builder, GlobalName

#: Such a pickle has about 100 bytes a tensor.
_MOST_BYTES = 1 << 23

# Operations of protocol 2, with their arguments (pickletools.py).
_PUT = rb"(?:q.|r..[\0-\x07]\0)"
_GET = rb"(?:h.|j....)"
_INTEGER = rb"(?:K.|M..|J....)"
_TEXT = rb"X(.)\0\0\0([\w.:/-]*)"  # its length in bytes, and itself


def _memoized(pattern: bytes) -> bytes:
    """Something that is put into the memo, or taken from there."""
    return rb"(?:%b%b|%b)" % (pattern, _PUT, _GET)


_ORDERED_DICT = _memoized(rb"ccollections\nOrderedDict\n") + rb"\)R" + _PUT
_STORAGE = b"".join(
    (
        rb"\(",
        _memoized(rb"X\x07\0\0\0storage"),
        _memoized(rb"ctorch\n[A-Za-z0-9]+Storage\n"),
        _memoized(_TEXT),  # its key
        _memoized(_TEXT),  # its location
        _INTEGER,  # its number of elements
        rb"t%bQ" % _PUT,
    )
)
_SIZES = rb"(?:\)|(?:%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,64}t)%b)" % (*(_INTEGER,) * 4, _PUT)
_TENSOR = b"".join(
    (
        _memoized(rb"ctorch\._utils\n_rebuild_tensor_v2\n"),
        rb"\(",
        _STORAGE,
        _INTEGER,  # its offset
        rb"%b{2}" % _SIZES,  # its shape and strides
        rb"[\x88\x89]",  # whether it requires a gradient
        _ORDERED_DICT,  # no hooks
        rb"t%bR%b" % (_PUT, _PUT),
    )
)
_VERSION = rb"}%b%bK.s" % (_PUT, _memoized(rb"X\x07\0\0\0version"))

#: A tensor with its name, or a module's version with the module's.
_ITEM = re.compile(rb"%b%b(?:%b|%b)" % (_TEXT, _PUT, _TENSOR, _VERSION), re.DOTALL)
_TEXTS_PER_ITEM = 3

#: What stands before all items, between two of them, since they come by the thousand and versions behind all tensors,
#: and behind them.
_BEGINS = (b"\x80\x02}q\0(", b"\x80\x02ccollections\nOrderedDict\nq\0)Rq\x01(")
_BETWEEN = re.compile(rb"|u\(|u}%bX\x09\0\0\0_metadata%b%b\(" % (_PUT, _PUT, _ORDERED_DICT), re.DOTALL)
_ENDS = (b"u.", b"u(u.", b"usb.")

#: Where a place of the memo holds nothing, or something else, and what builders find (ValueErrors): the machine tells.
_NOT_READ = (pickle.UnpicklingError, LookupError, TypeError, AttributeError, ValueError)


def read_state_dict(
    content: bytes, builders: Mapping[GlobalName, Builder], load_persistent: Callable[[Any], Any]
) -> dict[str, Any] | None:
    """Return what `PickleMachine` makes of the same, exactly; None if that is to read it: see there.

    Args:
        content: the pickle.
        builders: as for the machine.
        load_persistent: as for the machine. It has to refuse ids with anything in them but texts, numbers and names: of
            tuples, each in the next one, a key could be made whose hash overflows the interpreter's stack.
    """
    if not _is_state_dict(content):
        return None
    try:
        found: dict[str, Any] = _Unpickler(content, builders, load_persistent).load()
    except _NOT_READ:
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
    return (
        begin in _BEGINS
        and all(map(_BETWEEN.fullmatch, between))
        and end in _ENDS
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
