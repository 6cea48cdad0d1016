"""What the operations of a pickle mean: a stack and a memo of plain values, and of notes of what is not built.

Nothing is imported, and nothing called but what the caller lists. There is nothing that a file could execute, and
nothing grows beyond the file: the standard unpickler with harmless stubs would not do, a crafted file makes it allocate
(``LONG_BINPUT`` sizes its memo), recurse, and hash nested tuples forever.
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
    """Carries out operations one by one; each gets the place of its argument in the content.

    Args:
        content: all bytes.
        builders: what may be called, and by what that is replaced. Called with plain values.
        load_persistent: gives the value of a persistent id, as for ``pickle.Unpickler``.

    Attributes:
        is_exact: nothing that the standard unpickler would do was left out or done otherwise, besides what the
            builders do and what is `Unbuilt`.
        doubt: what was not understood first, and is `Unbuilt`; empty if nothing was. What follows is read all the same:
            a file that is broken is refused, whatever else is in it.
    """

    def __init__(
        self, content: bytes, builders: Mapping[GlobalName, Builder], load_persistent: Callable[[Any], Any]
    ) -> None:
        self._content, self._builders, self._load = content, builders, load_persistent
        self.is_exact = True
        self.clear()

    def clear(self) -> None:
        """Begin with another pickle."""
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
        """The uppermost text, cut for a message: usually the name of the tensor that is being made."""
        text = next((value for value in reversed(self._stack) if type(value) is str), "")
        return cut(text, MAX_SHOWN_NAME_LENGTH)

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def unsigned(self, start: int, end: int) -> int:
        """Return the integer that stands there: of 1, 2, 4 or 8 bytes."""
        return _UNSIGNED[end - start](self._content, start)[0]  # type: ignore[no-any-return]

    def _bytes(self, start: int, end: int) -> bytes | None:
        """Return an argument; None where it is too long to be kept."""
        return self._content[start:end] if end - start <= _MAX_TEXT_BYTES else None

    # Values

    def push_unicode(self, start: int, end: int) -> None:
        """Text, in UTF-8, as the standard unpickler reads it: half a surrogate pair is a character of its own."""
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
        """Text of Python 2, in an encoding that the file does not tell."""
        raw = self._bytes(start, end)
        if raw is None:
            self._stack.append(_TOO_LONG)
            return
        text = raw.decode("utf-8", errors="replace")
        if _REPLACED in text:
            self.is_exact = False
        self._stack.append(text)

    def push_bytes(self, start: int, end: int) -> None:
        """Bytes."""
        raw = self._bytes(start, end)
        self._stack.append(_TOO_LONG if raw is None else raw)

    def push_bytearray(self, start: int, end: int) -> None:
        """The same, which can be written to; here it cannot."""
        self.is_exact = False
        self.push_bytes(start, end)

    def push_line(self, start: int, end: int) -> None:
        """A value of protocol 0, as text up to the end of the line."""
        self.is_exact = False  # how a text is quoted has changed over time
        operation = chr(self._content[start - 1])
        raw = self._bytes(start, end - 1)
        self._stack.append(_TOO_LONG if raw is None else value_of_line(operation, raw))

    def push_byte(self, start: int, end: int) -> None:
        """An integer of one byte: most are that short, and this is much quicker."""
        self._stack.append(self._content[start])

    def push_unsigned(self, start: int, end: int) -> None:
        """An integer of two bytes."""
        self._stack.append(_UNSIGNED_2(self._content, start)[0])

    def push_signed(self, start: int, end: int) -> None:
        """An integer."""
        is_short = end - start <= _MAX_INTEGER_BYTES
        self._stack.append(int.from_bytes(self._content[start:end], "little", signed=True) if is_short else _TOO_LONG)

    def push_float(self, start: int, end: int) -> None:
        """A float."""
        self._stack.append(float_of_bytes(self._content[start:end]))

    def push_global(self, start: int, end: int) -> None:
        """The name of a class or function: two lines."""
        if end - start > _MAX_NAME_LENGTH:
            raise BrokenFileError(_NAME_TOO_LONG)
        raw = self._content[start:end]
        module, name = raw.decode("utf-8", errors="replace").split("\n")[:2]
        self._stack.append(GlobalName(module, name))

    def make_global(self, start: int, end: int) -> None:
        """The same, from two texts on the stack."""
        name, module = self._stack.pop(), self._stack.pop()
        if not (type(module) is str and type(name) is str):
            raise NotUnderstoodError("a malformed pickle")
        if len(module) + len(name) > _MAX_NAME_LENGTH:
            raise BrokenFileError(_NAME_TOO_LONG)
        self._stack.append(GlobalName(module, name))

    def load_persistent(self, start: int, end: int) -> None:
        """The value of the persistent id on the stack."""
        self._stack.append(self._made(self._load, self._stack.pop()))

    # The memo

    def push_memo(self, start: int, end: int) -> None:
        """What was kept."""
        self._stack.append(self._memo.get(_UNSIGNED_4(self._content, start)[0]))

    def put_memo(self, start: int, end: int) -> None:
        """Keep the uppermost value."""
        self._memo.put(_UNSIGNED_4(self._content, start)[0], self._stack[-1])

    def push_memo_of_byte(self, start: int, end: int) -> None:
        """The same as push_memo, with a number of one byte."""
        self._stack.append(self._memo.get(self._content[start]))

    def put_memo_of_byte(self, start: int, end: int) -> None:
        """The same as put_memo, with a number of one byte."""
        self._memo.put(self._content[start], self._stack[-1])

    def push_memo_line(self, start: int, end: int) -> None:
        """The same as push_memo, of protocol 0."""
        self._stack.append(self._memo.get(number_of_line(self._content[start:end])))

    def put_memo_line(self, start: int, end: int) -> None:
        """The same as put_memo, of protocol 0."""
        self._memo.put(number_of_line(self._content[start:end]), self._stack[-1])

    def memoize(self, start: int, end: int) -> None:
        """Keep the uppermost value under the next number."""
        self._memo.append(self._stack[-1])

    # The stack

    def mark(self, start: int, end: int) -> None:
        """Remember how high the stack is."""
        self._marks.append(len(self._stack))

    def pop(self, start: int, end: int) -> None:
        """Drop a value, or a mark."""
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_mark(self, start: int, end: int) -> None:
        """Drop all values above the last mark."""
        self._take_to_mark()

    def duplicate(self, start: int, end: int) -> None:
        """The uppermost value once more."""
        self._stack.append(self._stack[-1])

    def _take_to_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    # Containers

    def make_tuple(self, start: int, end: int) -> None:
        """A tuple of all values above the mark."""
        self._stack.append(tuple(self._take_to_mark()))

    def make_tuple_of_1(self, start: int, end: int) -> None:
        """A tuple of one value."""
        self._stack[-1:] = [(self._stack[-1],)]

    def make_tuple_of_2(self, start: int, end: int) -> None:
        """A tuple of two values."""
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def make_tuple_of_3(self, start: int, end: int) -> None:
        """A tuple of three values."""
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def make_list(self, start: int, end: int) -> None:
        """A list of all values above the mark."""
        self._stack.append(self._take_to_mark())

    def append(self, start: int, end: int) -> None:
        """One more item."""
        item = self._stack.pop()
        self._extend([item])

    def appends(self, start: int, end: int) -> None:
        """More items: all above the mark."""
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
        """A dict of all values above the mark."""
        items = self._take_to_mark()
        self._stack.append({})
        self._update(items)

    def set_item(self, start: int, end: int) -> None:
        """One more key and its value."""
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_items(self, start: int, end: int) -> None:
        """More keys and values: all above the mark."""
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
        """A set, not built: its items may be slow to hash."""
        self._stack.append(Unbuilt(GlobalName("builtins", "frozenset"), (self._take_to_mark(),)))

    def add_items(self, start: int, end: int) -> None:
        """More items of a set."""
        items = self._take_to_mark()
        self._stack[-1].arguments[0].extend(items)  # only EMPTY_SET pushes such

    # Objects

    def reduce(self, start: int, end: int) -> None:
        """Call a function, or note it."""
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def new_object_with_keywords(self, start: int, end: int) -> None:
        """Note an object that is made with keywords."""
        keywords, arguments, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(Unbuilt(function if isinstance(function, GlobalName) else None, (arguments, keywords)))

    def make_object(self, start: int, end: int) -> None:
        """The same as reduce, of protocol 0."""
        function, *arguments = self._take_to_mark()
        self._stack.append(self._call(function, tuple(arguments)))

    def make_instance(self, start: int, end: int) -> None:
        """The same as reduce, of protocol 0, with the class's name as argument."""
        arguments = tuple(self._take_to_mark())
        self.push_global(start, end)
        self._stack.append(self._call(self._stack.pop(), arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, (GlobalName, Unbuilt)) or function is _TOO_LONG:
            raise BrokenFileError("damaged checkpoint (its pickle calls what is no function)")
        builder = self._builders.get(function) if isinstance(function, GlobalName) else None
        if builder is not None and (type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS):
            # torch would take any iterable for them, of any length, and nobody would have looked at what it makes
            raise BrokenFileError(f"damaged checkpoint (its pickle calls {function} with what are no arguments)")
        if not isinstance(function, GlobalName) or type(arguments) is not tuple:
            return Unbuilt(None, ())
        return Unbuilt(function, arguments) if builder is None else self._made(builder, arguments)

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
        """Note the state of an object that is not built; set the attributes of a dict, such as module versions.

        A tensor, or a storage, that gets another state is not understood: torch may put it elsewhere then (`set_`).
        """
        state = self._stack.pop()
        target = self._stack[-1]
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


#: Dicts that are built as they were saved.
_DICTS = (dict, OrderedDict, Counter, defaultdict)

_METHODS = frozenset(dir(OrderedDict))


def _is_plain_attribute(name: Any, value: Any) -> bool:
    """Return whether it hides no method of a dict, and holds no tensor.

    The one that nn.Module.state_dict sets holds the versions of modules.
    """
    if name == "_metadata":
        return isinstance(value, dict)
    return type(name) is str and name not in _METHODS and type(value) in SCALARS


_TOO_LONG = Unbuilt(None, ())

#: No class or function has a longer name. torch takes time in the square of it to refuse one: hours, of a megabyte
#: (torch/serialization.py, _get_wo_message).
_MAX_NAME_LENGTH = 1000
_NAME_TOO_LONG = f"damaged checkpoint (its pickle names a class or function by more than {_MAX_NAME_LENGTH} characters)"

#: Nobody has a use for more; and a short pickle can give the same ones a million times.
_MAX_ARGUMENTS = 16

#: Quicker than int.from_bytes of a slice.
_UNSIGNED = {length: struct.Struct(f"<{code}").unpack_from for length, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))}
_UNSIGNED_2, _UNSIGNED_4 = _UNSIGNED[2], _UNSIGNED[4]

#: Stands for bytes that are no text.
_REPLACED = "\ufffd"
