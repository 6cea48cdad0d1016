"""Read pickles without trusting them: which operation comes next, and where its argument ends."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rankload._checkpoint.broken import BrokenFileError, CutOffError
from rankload._checkpoint.pickle_stack import PickleStack
from rankload._checkpoint.pickle_values import Builder, Content, GlobalName, NotUnderstoodError, Unbuilt

#: More than 50,000 tensors' worth. Bounds time (some seconds) and memory (as much as this many stack items).
_MOST_OPERATIONS = 4_000_000


class PickleMachine:
    """Reads pickles that lie one after the other.

    Args:
        content: all bytes.
        builders: what may be called, and by what that is replaced. Called with plain values.
        load_persistent: gives the value of a persistent id, as for ``pickle.Unpickler``.

    Attributes:
        position: offset of the next pickle.
    """

    def __init__(
        self,
        content: Content,
        builders: Mapping[GlobalName, Builder],
        load_persistent: Callable[[Any], Any],
    ) -> None:
        self.position = 0
        self._content, self._stack = content, PickleStack(content, builders, load_persistent)
        self._operations = 0

    def next_pickle(self) -> Any:
        """Read one pickle and return its value.

        Raises:
            CutOffError: the content ends before the pickle does.
            NotUnderstoodError: see there.
        """
        self._stack.clear()
        try:
            self._run()
            return self._stack.top
        except (NotUnderstoodError, BrokenFileError):
            raise
        except (LookupError, TypeError, AttributeError, ValueError):  # of a list here that holds something else
            raise NotUnderstoodError("a malformed pickle") from None

    def _run(self) -> None:
        """Carry out operations up to the last one of the pickle."""
        content, size_bytes = self._content, len(self._content)
        position = self.position
        while self._operations < _MOST_OPERATIONS:
            self._operations += 1
            if position >= size_bytes:
                raise CutOffError(_CUT_OFF)
            operation = _OPERATIONS[content[position]]
            start = position + 1
            if operation.argument_bytes >= 0:
                position = start + operation.argument_bytes
            else:
                start, position = self._argument(operation.argument_bytes, start)
            if position > size_bytes:
                raise CutOffError(_CUT_OFF)
            if operation.meaning is not None:
                operation.meaning(self._stack, start, position)
            elif operation.is_last:
                self.position = position
                return
            elif not operation.is_harmless:
                raise NotUnderstoodError(f"a pickle with {operation.name}")
        raise NotUnderstoodError("a pickle of too many operations")

    def _argument(self, code: int, start: int) -> tuple[int, int]:
        """Return where an argument begins and ends whose length stands in the file."""
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


def _pushing(make: Callable[[], Any]) -> Callable[[PickleStack, int, int], None]:
    return lambda stack, start, end: stack.push(make())


_CUT_OFF = "truncated checkpoint (a pickle in it is cut off)"

_MEANINGS: dict[str, Callable[[PickleStack, int, int], None]] = {
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"), PickleStack.push_text
    ),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), PickleStack.push_bytes),
    **dict.fromkeys(("INT", "LONG", "FLOAT", "STRING", "UNICODE"), PickleStack.push_line),
    **dict.fromkeys(("BININT1", "BININT2"), PickleStack.push_unsigned),
    **dict.fromkeys(("BININT", "LONG1", "LONG4"), PickleStack.push_signed),
    "BINFLOAT": PickleStack.push_float,
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_TUPLE": _pushing(tuple),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_SET": _pushing(lambda: Unbuilt(GlobalName("builtins", "set"), ([],))),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), PickleStack.push_memo),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), PickleStack.put_memo),
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
}

#: They tell the reader something, and leave the stack alone.
_HARMLESS = frozenset({"PROTO", "FRAME"})

#: How many lines an argument has, and in how many bytes its length stands, by pickletools' code for it.
_TWO_LINES = -100
_LINES = {pickletools.UP_TO_NEWLINE: 1, _TWO_LINES: 2}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


@dataclass(frozen=True, slots=True)
class _Operation:
    """What an opcode does to the machine.

    Attributes:
        name: pickletools' name for it.
        argument_bytes: length of its argument; negative: a code for a length that stands in the file.
        meaning: what it does; None: nothing, or more than this machine knows.
        is_harmless: nothing.
        is_last: the pickle ends with it.
    """

    name: str
    argument_bytes: int
    meaning: Callable[[PickleStack, int, int], None] | None
    is_harmless: bool
    is_last: bool


def _operation(opcode: pickletools.OpcodeInfo) -> _Operation:
    argument_bytes = opcode.arg.n if opcode.arg is not None else 0
    if opcode.name in ("GLOBAL", "INST"):
        argument_bytes = _TWO_LINES
    meaning = _MEANINGS.get(opcode.name)
    return _Operation(opcode.name, argument_bytes, meaning, opcode.name in _HARMLESS, opcode.name == "STOP")


_OPERATIONS = {ord(opcode.code): _operation(opcode) for opcode in pickletools.opcodes}
