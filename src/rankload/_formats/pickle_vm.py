"""Read pickles without trusting them: decode each operation, and find the end of its argument."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from rankload._formats.broken import BrokenFileError, CutOffError
from rankload._formats.pickle_stack import PickleStack
from rankload._formats.pickle_values import Builder, GlobalName, NotUnderstoodError, Unbuilt

#: Most operations, more than 50,000 tensors need. Bounds the time (some seconds) and the number of stack items.
_MAX_OPERATIONS = 4_000_000


class PickleMachine:
    """A reader of consecutive pickles.

    Args:
        content: all bytes of the pickles.
        builders: replacement for each function that a pickle may call. Builders get plain values.
        load_persistent: returns the value of a persistent id, as for ``pickle.Unpickler``.

    Attributes:
        position: offset of the next pickle.
    """

    def __init__(
        self,
        content: bytes,
        builders: Mapping[GlobalName, Builder],
        load_persistent: Callable[[Any], Any],
    ) -> None:
        self.position = 0
        self._content, self._stack = content, PickleStack(content, builders, load_persistent)
        self._operations_left = _MAX_OPERATIONS

    @property
    def is_exact(self) -> bool:
        """Whether all values so far are what the standard unpickler would make; see `PickleStack`."""
        return self._stack.is_exact

    def next_pickle(self) -> Any:
        """Read one pickle and return its value.

        Raises:
            CutOffError: the content ends before the pickle does.
            BrokenFileError: the pickle contains something that no writer makes.
            NotUnderstoodError: only torch.load can read the pickle.
        """
        self._stack.clear()
        try:
            self._run()
            if self._stack.doubt:
                raise NotUnderstoodError(self._stack.doubt)
            return self._stack.top
        except (NotUnderstoodError, CutOffError):
            raise
        except BrokenFileError as error:
            name = self._stack.nearest_text  # the key in the dict that was being filled
            raise BrokenFileError(f"{error}, at {name!r}" if name else str(error)) from None
        except (LookupError, TypeError, AttributeError, ValueError):  # an operation found another type, or no value
            raise NotUnderstoodError("a malformed pickle") from None

    def _run(self) -> None:
        """Carry out operations up to the last one of the pickle."""
        content, stack, size_bytes = self._content, self._stack, len(self._content)
        position = self.position
        if position >= size_bytes:
            raise CutOffError(_CUT_OFF)
        for count in range(self._operations_left):
            argument_bytes, meaning = _OPERATIONS[content[position]]
            start = position + 1
            if argument_bytes >= 0:
                position = start + argument_bytes
            else:
                start, position = self._argument(argument_bytes, start)
            if meaning is None:
                self.position, self._operations_left = position, self._operations_left - count - 1
                return
            if position >= size_bytes:  # not even the last operation of the pickle comes after it
                raise CutOffError(_CUT_OFF)
            meaning(stack, start, position)
        raise NotUnderstoodError("a pickle of too many operations")

    def _argument(self, code: int, start: int) -> tuple[int, int]:
        """Return begin and end of an argument whose length is stored in the file."""
        if code in _LINES:
            end = start
            for _ in range(_LINES[code]):
                end = self._content.find(b"\n", end) + 1
                if end == 0:
                    raise CutOffError(_CUT_OFF)
            return start, end
        begin = start + _LENGTH_BYTES[code]
        if begin > len(self._content):
            raise CutOffError(_CUT_OFF)
        return begin, begin + self._stack.unsigned(start, begin)


def _pushing(make: Callable[[], Any]) -> _Meaning:
    return lambda stack, start, end: stack.push(make())


def _harmless(stack: PickleStack, start: int, end: int) -> None:
    """Ignore an operation that does not change the stack."""


def _not_understood(name: str) -> _Meaning:
    def refuse(stack: PickleStack, start: int, end: int) -> None:
        raise NotUnderstoodError(f"a pickle with {name}")

    return refuse


_CUT_OFF = "truncated checkpoint (a pickle in it is cut off)"

#: Apply an operation to the stack, given begin and end of its argument.
_Meaning = Callable[[PickleStack, int, int], None]

_MEANINGS: dict[str, _Meaning] = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), PickleStack.push_unicode),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), PickleStack.push_text),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), PickleStack.push_bytes),
    "BYTEARRAY8": PickleStack.push_bytearray,
    **dict.fromkeys(("INT", "LONG", "FLOAT", "STRING", "UNICODE"), PickleStack.push_line),
    "BININT1": PickleStack.push_byte,
    "BININT2": PickleStack.push_unsigned,
    **dict.fromkeys(("BININT", "LONG1", "LONG4"), PickleStack.push_signed),
    "BINFLOAT": PickleStack.push_float,
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_TUPLE": _pushing(tuple),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_SET": _pushing(lambda: Unbuilt(GlobalName("builtins", "set"), ())),
    "BINGET": PickleStack.push_memo_of_byte,
    "LONG_BINGET": PickleStack.push_memo,
    "BINPUT": PickleStack.put_memo_of_byte,
    "LONG_BINPUT": PickleStack.put_memo,
    "GET": PickleStack.push_memo_line,
    "PUT": PickleStack.put_memo_line,
    "MEMOIZE": PickleStack.memoize,
    "GLOBAL": PickleStack.push_global,
    "STACK_GLOBAL": PickleStack.make_global,
    "MARK": PickleStack.mark,
    "POP": PickleStack.pop,
    "POP_MARK": PickleStack.pop_mark,
    "DUP": PickleStack.duplicate,
    "TUPLE": PickleStack.make_tuple,
    "TUPLE1": PickleStack.make_tuple_of_1,
    "TUPLE2": PickleStack.make_tuple_of_2,
    "TUPLE3": PickleStack.make_tuple_of_3,
    "LIST": PickleStack.make_list,
    "APPEND": PickleStack.append,
    "APPENDS": PickleStack.appends,
    "DICT": PickleStack.make_dict,
    "SETITEM": PickleStack.set_item,
    "SETITEMS": PickleStack.set_items,
    "FROZENSET": PickleStack.make_frozen_set,
    "ADDITEMS": PickleStack.add_items,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), PickleStack.reduce),
    "NEWOBJ_EX": PickleStack.new_object_with_keywords,
    "OBJ": PickleStack.make_object,
    "INST": PickleStack.make_instance,
    "BUILD": PickleStack.build,
    "BINPERSID": PickleStack.load_persistent,
    **dict.fromkeys(("PROTO", "FRAME"), _harmless),
}

#: Lines of an argument, and size in bytes of its length field, by pickletools' code.
_TWO_LINES = -100
_LINES = {pickletools.UP_TO_NEWLINE: 1, _TWO_LINES: 2}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _operation(opcode: pickletools.OpcodeInfo) -> tuple[int, _Meaning | None]:
    """Return the length of an operation's argument, and its effect; None for STOP, which ends a pickle.

    A negative length is a code for an argument of variable length (`_LINES`, `_LENGTH_BYTES`).
    """
    argument_bytes = opcode.arg.n if opcode.arg is not None else 0
    if opcode.name in ("GLOBAL", "INST"):
        argument_bytes = _TWO_LINES
    if opcode.name == "STOP":
        return argument_bytes, None
    return argument_bytes, _MEANINGS.get(opcode.name) or _not_understood(opcode.name)


_OPERATIONS = {ord(opcode.code): _operation(opcode) for opcode in pickletools.opcodes}
