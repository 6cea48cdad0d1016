"""Carry out the operations of a pickle on a stack and a memo of plain values.

Nothing is imported, and only the caller's builders are called; other objects become `Unbuilt` notes. A file can execute
nothing, and memory stays proportional to the file. The standard unpickler with harmless stubs is not safe enough: a
crafted file makes it allocate (``LONG_BINPUT`` sizes its memo), recurse, and hash nested tuples forever.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.entry import StorageEntry, TensorEntry
from rankload._formats.pickle_memo import PickleMemo
from rankload._formats.pickle_text import float_of_bytes, number_of_line, value_of_line
from rankload._formats.pickle_values import SCALARS, Builder, GlobalName, NotUnderstoodError, Unbuilt, checked_key
from rankload._text import MAX_SHOWN_NAME_LENGTH, cut

#: Longer texts (a weight saved as text, a dataset) become `Unbuilt`.
_MAX_TEXT_BYTES = 1 << 24

#: Longer integers would take quadratic time to show.
_MAX_INTEGER_BYTES = 256


class PickleStack:
    """The stack of a pickle machine, with one method per operation.

    Each operation gets ``start`` and ``end``: the range of its argument in the content.

    Args:
        content: all bytes of the pickles.
        builders: replacement for each function that a pickle may call. Builders get plain values.
        load_persistent: returns the value of a persistent id, as for ``pickle.Unpickler``.

    Attributes:
        is_exact: whether all values are what the standard unpickler would make, apart from the builders' results and
            `Unbuilt` objects.
        doubt: the first thing that was not understood, and became `Unbuilt`; empty if all was. Reading continues after
            a doubt, so that a broken file is still refused.
    """

    def __init__(
        self, content: bytes, builders: Mapping[GlobalName, Builder], load_persistent: Callable[[Any], Any]
    ) -> None:
        self._content, self._builders, self._load = content, builders, load_persistent
        self._cost_left = _COST_PER_BYTE * len(content) + _FREE_COST
        self.is_exact = True
        self.clear()

    def clear(self) -> None:
        """Reset the stack for another pickle."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo = PickleMemo()
        self.doubt = ""

    @property
    def top(self) -> Any:
        """The uppermost value."""
        return self._stack[-1]

    @property
    def nearest_text(self) -> str:
        """The uppermost string, shortened for a message: usually the name of the current tensor."""
        text = next((value for value in reversed(self._stack) if type(value) is str), "")
        return cut(text, MAX_SHOWN_NAME_LENGTH)

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def unsigned(self, start: int, end: int) -> int:
        """Return the unsigned little-endian integer at ``start`` to ``end``: 1, 2, 4 or 8 bytes."""
        return _UNSIGNED[end - start](self._content, start)[0]  # type: ignore[no-any-return]

    def _bytes(self, start: int, end: int) -> bytes | None:
        """Return an argument's bytes; None if the argument is too long to keep."""
        return self._content[start:end] if end - start <= _MAX_TEXT_BYTES else None

    # Values

    def push_unicode(self, start: int, end: int) -> None:
        """Push a string from UTF-8. Lone surrogates are allowed, as in the standard unpickler."""
        raw = self._bytes(start, end)
        if raw is None:
            self._stack.append(_TOO_LONG)
            return
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.is_exact = False
            text = raw.decode("utf-8", errors="surrogatepass")
        self._stack.append(text)

    def push_text(self, start: int, end: int) -> None:
        """Push a Python 2 string, whose encoding the file does not name."""
        raw = self._bytes(start, end)
        if raw is None:
            self._stack.append(_TOO_LONG)
            return
        text = raw.decode("utf-8", errors="replace")
        if _REPLACED in text:
            self.is_exact = False
        self._stack.append(text)

    def push_bytes(self, start: int, end: int) -> None:
        """Push bytes."""
        raw = self._bytes(start, end)
        self._stack.append(_TOO_LONG if raw is None else raw)

    def push_bytearray(self, start: int, end: int) -> None:
        """Push a bytearray, as bytes."""
        self.is_exact = False
        self.push_bytes(start, end)

    def push_line(self, start: int, end: int) -> None:
        """Push a value of protocol 0: text up to the end of the line."""
        self.is_exact = False  # the quoting of strings has changed over time
        operation = chr(self._content[start - 1])
        raw = self._bytes(start, end - 1)
        self._stack.append(_TOO_LONG if raw is None else value_of_line(operation, raw))

    def push_byte(self, start: int, end: int) -> None:
        """Push an integer of one byte. Most integers are that short, and this is much faster."""
        self._stack.append(self._content[start])

    def push_unsigned(self, start: int, end: int) -> None:
        """Push an integer of two bytes."""
        self._stack.append(_UNSIGNED_2(self._content, start)[0])

    def push_signed(self, start: int, end: int) -> None:
        """Push a signed integer."""
        is_short = end - start <= _MAX_INTEGER_BYTES
        self._stack.append(int.from_bytes(self._content[start:end], "little", signed=True) if is_short else _TOO_LONG)

    def push_float(self, start: int, end: int) -> None:
        """Push a float."""
        self._stack.append(float_of_bytes(self._content[start:end]))

    def push_global(self, start: int, end: int) -> None:
        """Push the name of a class or function: two lines."""
        if end - start > _MAX_NAME_LENGTH:
            raise BrokenFileError(_NAME_TOO_LONG)
        raw = self._content[start:end]
        module, name = raw.decode("utf-8", errors="replace").split("\n")[:2]
        self._stack.append(GlobalName(module, name))

    def make_global(self, start: int, end: int) -> None:
        """Push the name of a class or function, from two strings on the stack."""
        name, module = self._stack.pop(), self._stack.pop()
        if not (type(module) is str and type(name) is str):
            raise NotUnderstoodError("a malformed pickle")
        if len(module) + len(name) > _MAX_NAME_LENGTH:
            raise BrokenFileError(_NAME_TOO_LONG)
        self._stack.append(GlobalName(module, name))

    def load_persistent(self, start: int, end: int) -> None:
        """Replace the persistent id on the stack by its value."""
        self._stack.append(self._made(self._load, self._stack.pop()))

    # The memo

    def push_memo(self, start: int, end: int) -> None:
        """Push a value of the memo, by a number of four bytes."""
        self._stack.append(self._memo.get(_UNSIGNED_4(self._content, start)[0]))

    def put_memo(self, start: int, end: int) -> None:
        """Store the uppermost value in the memo, under a number of four bytes."""
        self._memo.put(_UNSIGNED_4(self._content, start)[0], self._stack[-1])

    def push_memo_of_byte(self, start: int, end: int) -> None:
        """Push a value of the memo, by a number of one byte."""
        self._stack.append(self._memo.get(self._content[start]))

    def put_memo_of_byte(self, start: int, end: int) -> None:
        """Store the uppermost value in the memo, under a number of one byte."""
        self._memo.put(self._content[start], self._stack[-1])

    def push_memo_line(self, start: int, end: int) -> None:
        """Push a value of the memo, by a number of protocol 0 (text)."""
        self._stack.append(self._memo.get(number_of_line(self._content[start:end])))

    def put_memo_line(self, start: int, end: int) -> None:
        """Store the uppermost value in the memo, under a number of protocol 0 (text)."""
        self._memo.put(number_of_line(self._content[start:end]), self._stack[-1])

    def memoize(self, start: int, end: int) -> None:
        """Store the uppermost value in the memo, under the next number."""
        self._memo.append(self._stack[-1])

    # The stack

    def mark(self, start: int, end: int) -> None:
        """Mark the current height of the stack."""
        self._marks.append(len(self._stack))

    def pop(self, start: int, end: int) -> None:
        """Drop the uppermost value or mark."""
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_mark(self, start: int, end: int) -> None:
        """Drop all values above the last mark."""
        self._take_to_mark()

    def duplicate(self, start: int, end: int) -> None:
        """Push the uppermost value again."""
        self._stack.append(self._stack[-1])

    def _take_to_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    # Containers

    def make_tuple(self, start: int, end: int) -> None:
        """Make a tuple of all values above the mark."""
        self._stack.append(tuple(self._take_to_mark()))

    def make_tuple_of_1(self, start: int, end: int) -> None:
        """Make a tuple of one value."""
        self._stack[-1:] = [(self._stack[-1],)]

    def make_tuple_of_2(self, start: int, end: int) -> None:
        """Make a tuple of two values."""
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def make_tuple_of_3(self, start: int, end: int) -> None:
        """Make a tuple of three values."""
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def make_list(self, start: int, end: int) -> None:
        """Make a list of all values above the mark."""
        self._stack.append(self._take_to_mark())

    def append(self, start: int, end: int) -> None:
        """Append one item to a list."""
        item = self._stack.pop()
        self._extend([item])

    def appends(self, start: int, end: int) -> None:
        """Append all values above the mark to a list."""
        self._extend(self._take_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Unbuilt) and target is not _TOO_LONG:
            target.items.extend(items)
        else:
            self.is_exact = False

    def make_dict(self, start: int, end: int) -> None:
        """Make a dict of all keys and values above the mark."""
        items = self._take_to_mark()
        self._stack.append({})
        self._update(items)

    def set_item(self, start: int, end: int) -> None:
        """Add one key and its value to a dict."""
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_items(self, start: int, end: int) -> None:
        """Add all keys and values above the mark to a dict."""
        self._update(self._take_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise NotUnderstoodError("a malformed pickle")
        if type(target) in _DICTS:
            for key, value in zip(items[::2], items[1::2], strict=True):
                try:
                    target[checked_key(key, target)] = value
                except NotUnderstoodError as error:
                    self._note(error)
        elif isinstance(target, Unbuilt) and target is not _TOO_LONG:
            target.items.extend(items)
        else:
            self.is_exact = False

    def make_frozen_set(self, start: int, end: int) -> None:
        """Make a frozenset, as `Unbuilt`: its items may be slow to hash."""
        self._stack.append(Unbuilt(GlobalName("builtins", "frozenset"), (self._take_to_mark(),)))

    def add_items(self, start: int, end: int) -> None:
        """Add all values above the mark to a set, which is not built."""
        items = self._take_to_mark()
        target = self._stack[-1]
        if isinstance(target, Unbuilt) and target is not _TOO_LONG:
            target.items.extend(items)
        else:
            self.is_exact = False

    # Objects

    def reduce(self, start: int, end: int) -> None:
        """Call a builder, or note the call as `Unbuilt`."""
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def new_object_with_keywords(self, start: int, end: int) -> None:
        """Note an object that is made with keyword arguments."""
        keywords, arguments, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(Unbuilt(function if isinstance(function, GlobalName) else None, (arguments, keywords)))

    def make_object(self, start: int, end: int) -> None:
        """Call a builder, or note the call, for the OBJ operation of protocol 0."""
        function, *arguments = self._take_to_mark()
        self._stack.append(self._call(function, tuple(arguments)))

    def make_instance(self, start: int, end: int) -> None:
        """Call a builder, or note the call, for the INST operation of protocol 0, which names the class itself."""
        arguments = tuple(self._take_to_mark())
        self.push_global(start, end)
        self._stack.append(self._call(self._stack.pop(), arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, (GlobalName, Unbuilt)) or function is _TOO_LONG:
            raise BrokenFileError("damaged checkpoint (its pickle calls what is not a function)")
        builder = self._builders.get(function) if isinstance(function, GlobalName) else None
        if builder is not None and (type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS):
            # torch would accept any iterable, of any length, as arguments, and the result would be unchecked
            raise BrokenFileError(f"damaged checkpoint (its pickle calls {function} with invalid arguments)")
        if type(arguments) is not tuple:  # no pickler does so, and nobody knows how much such a call copies
            raise BrokenFileError("damaged checkpoint (its pickle makes a call whose arguments are no tuple)")
        cost = self._copy(*arguments[:_MAX_ARGUMENTS])
        if not isinstance(function, GlobalName):
            return Unbuilt(None, (), cost=cost)
        made = Unbuilt(function, arguments) if builder is None else self._made(builder, arguments)
        if isinstance(made, Unbuilt):
            made.cost = cost
        return made

    def _copy(self, *values: Any) -> int:
        """Count what torch.load and the builders copy, and return the cost of that (see `_COST_PER_BYTE`).

        Raises:
            BrokenFileError: the pickle is far shorter: it passes the same values again and again.
        """
        cost = sum(map(_cost, values))
        self._cost_left -= cost
        if self._cost_left < 0:
            raise BrokenFileError("damaged checkpoint (its pickle copies the same values again and again)")
        return cost

    def _made(self, make: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return make(argument)
        except BrokenFileError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            self._note(error)
            return Unbuilt(None, ())

    def _note(self, error: Exception) -> None:
        self.doubt = self.doubt or (str(error) if isinstance(error, NotUnderstoodError) else "a malformed pickle")

    def build(self, start: int, end: int) -> None:
        """Note the state of an `Unbuilt` object, or set attributes of a dict, such as module versions.

        A new state of a tensor or storage is not understood: with it, torch may replace the storage (`set_`).
        """
        state = self._stack.pop()
        target = self._stack[-1]
        self._copy(*state) if type(state) is tuple and len(state) <= _MAX_ARGUMENTS else self._copy(state)
        if isinstance(target, (TensorEntry, StorageEntry)):
            self._note(NotUnderstoodError("a tensor whose state is set"))
        if isinstance(target, Unbuilt):
            target.state = state
            return
        if type(target) is OrderedDict and type(state) is dict:
            known = {name: value for name, value in state.items() if _is_plain_attribute(name, value)}
            vars(target).update(known)
            self.is_exact &= len(known) == len(state)
        else:
            self.is_exact = False


#: Dict types that are built as they were saved.
_DICTS = (dict, OrderedDict, Counter, defaultdict)

_METHODS = frozenset(dir(OrderedDict))


def _is_plain_attribute(name: Any, value: Any) -> bool:
    """Return whether an attribute of a dict hides no method of the dict, and holds no tensor.

    ``_metadata``, which nn.Module.state_dict sets, holds the versions of modules.
    """
    if name == "_metadata":
        return isinstance(value, dict)
    return type(name) is str and name not in _METHODS and type(value) in SCALARS


def _cost(value: Any) -> int:
    if isinstance(value, Unbuilt):
        return value.cost + _ITEM_COST * len(value.items)
    if type(value) in _CONTAINERS:
        return _ITEM_COST * len(value)
    return len(value) if type(value) in (str, bytes) else 0


_CONTAINERS = frozenset({*_DICTS, list, tuple})

_TOO_LONG = Unbuilt(None, (), cost=_MAX_TEXT_BYTES)

#: Longest name of a class or function. The time that torch takes to refuse a name grows with the square of its length:
#: hours for a megabyte (torch/serialization.py, _get_wo_message).
_MAX_NAME_LENGTH = 1000
_NAME_TOO_LONG = f"damaged checkpoint (its pickle names a class or function by more than {_MAX_NAME_LENGTH} characters)"

#: Most arguments of a call. No writer uses more, and a short pickle can pass the same arguments a million times.
_MAX_ARGUMENTS = 16

#: What calls may copy, for each byte of the pickle, and besides: a character costs 1. Without a limit, a megabyte could
#: become terabytes: four bytes copy any value once more. An honest pickle passes the text of bytes through a few calls.
_COST_PER_BYTE = 8
_FREE_COST = 1 << 20

#: An item of a list or a dict takes about a microsecond, and at least a byte of an honest pickle.
_ITEM_COST = 8

#: Faster than int.from_bytes of a slice.
_UNSIGNED = {length: struct.Struct(f"<{code}").unpack_from for length, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))}
_UNSIGNED_2, _UNSIGNED_4 = _UNSIGNED[2], _UNSIGNED[4]

#: Replacement character for bytes that are not UTF-8.
_REPLACED = "\ufffd"
