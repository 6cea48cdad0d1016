"""Walk through pickles without building anything: no import, no call; text, integers, tuples and lists at most.

Everything else on the pickle machine's stack is None, "something". That is enough to read the persistent ids
of torch's storages. The standard unpickler with harmless stubs would not do: a crafted file makes it allocate
(``LONG_BINPUT`` sizes its memo), recurse, and hash nested tuples for ever.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rankload._checkpoint.broken import BrokenFileError

#: More than 50,000 tensors' worth. Bounds time (half a second) and memory (as much as this many stack items).
_MOST_OPERATIONS = 2_000_000

#: Keys, storage classes and device tags are short; longer texts (source code, notes) become "something".
_LONGEST_TEXT_BYTES = 256


class NotUnderstoodError(ValueError):
    """The pickle is malformed, too long, or uses what this walk does not know. Not a verdict on the file."""


class Content(Protocol):
    """The file's bytes: a mapping, or bytes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def find(self, sub: bytes, start: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A class or function that the pickle mentions; never imported."""

    module: str
    name: str


class PickleWalk:
    """Reads pickles that lie one after the other.

    Attributes:
        position: offset of the next pickle.
        persistent_ids: what the pickles hand to ``persistent_load``, in order.
    """

    def __init__(self, content: Content) -> None:
        self.position = 0
        self.persistent_ids: list[Any] = []
        self._content = content
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def next_pickle(self) -> Any:
        """Walk through one pickle and return its value: text, integer, tuple, list, or None for all else.

        Raises:
            BrokenFileError: the content ends before the pickle does.
            NotUnderstoodError: see there.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            self._run()
            return self._stack[-1]
        except (IndexError, KeyError):
            raise NotUnderstoodError("a malformed pickle") from None

    def _run(self) -> None:
        """Carry out operations up to the last one of the pickle."""
        content, size_bytes = self._content, len(self._content)
        position = self.position
        for _ in range(_MOST_OPERATIONS):
            if position >= size_bytes:
                raise BrokenFileError(_CUT_OFF)
            operation = _OPERATIONS[content[position]]
            start = position + 1
            if operation.argument_bytes >= 0:
                position = start + operation.argument_bytes
            else:
                start, position = self._argument(operation.argument_bytes, start)
            if position > size_bytes:
                raise BrokenFileError(_CUT_OFF)
            if operation.meaning is not None:
                operation.meaning(self, start, position)
            elif operation.is_last:
                self.position = position
                return
            else:
                self._replace(operation)
        raise NotUnderstoodError("a pickle of too many operations")

    def _argument(self, code: int, start: int) -> tuple[int, int]:
        """Return where an argument begins and ends whose length stands in the file."""
        if code in _LINES:
            end = start
            for _ in range(_LINES[code]):
                end = self._content.find(b"\n", end) + 1
                if end == 0:
                    raise BrokenFileError(_CUT_OFF)
            return start, end
        begin = start + _LENGTH_BYTES[code]
        if begin > len(self._content):
            raise BrokenFileError(_CUT_OFF)
        return begin, begin + self._integer(start, begin)

    def _replace(self, operation: _Operation) -> None:
        """Take what the operation takes from the stack and leave "something" in its place."""
        stack = self._stack
        if operation.takes_to_mark:
            del stack[self._marks.pop() :]
        if operation.takes:
            del stack[-operation.takes :]
        stack.extend((None,) * operation.gives)

    def _integer(self, start: int, end: int) -> int:
        if end - start == 1:
            byte: int = self._content[start]  # most integers are that short, and this is three times as quick
            return byte
        return int.from_bytes(self._content[start:end], "little")

    def _text(self, start: int, end: int) -> str | None:
        if end - start > _LONGEST_TEXT_BYTES:
            return None
        text: bytes = self._content[start:end]
        return text.decode("utf-8", errors="replace")

    # The operations below have to be followed to find torch's storages; all others only move the stack.

    def _push_text(self, start: int, end: int) -> None:
        self._stack.append(self._text(start, end))

    def _push_unsigned(self, start: int, end: int) -> None:
        self._stack.append(self._integer(start, end))

    def _push_signed(self, start: int, end: int) -> None:
        is_short = end - start <= 8
        value = int.from_bytes(self._content[start:end], "little", signed=True) if is_short else None
        self._stack.append(value)

    def _push_global(self, start: int, end: int) -> None:
        lines = self._text(start, end)
        self._stack.append(GlobalName(*lines.splitlines()) if lines and lines.count("\n") == 2 else None)

    def _make_global(self, start: int, end: int) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(GlobalName(module, name) if isinstance(module, str) and isinstance(name, str) else None)

    def _push_memo(self, start: int, end: int) -> None:
        self._stack.append(self._memo[self._integer(start, end)])

    def _put_memo(self, start: int, end: int) -> None:
        self._memo[self._integer(start, end)] = self._stack[-1]

    def _push_memo_line(self, start: int, end: int) -> None:
        self._stack.append(self._memo[self._line_number(start, end)])

    def _put_memo_line(self, start: int, end: int) -> None:
        self._memo[self._line_number(start, end)] = self._stack[-1]

    def _line_number(self, start: int, end: int) -> int:
        text = self._text(start, end) or ""
        if not text.strip().isdecimal():
            raise NotUnderstoodError("a malformed pickle")
        return int(text)

    def _memoize(self, start: int, end: int) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _mark(self, start: int, end: int) -> None:
        self._marks.append(len(self._stack))

    def _pop(self, start: int, end: int) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _take_to_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def _make_tuple(self, start: int, end: int) -> None:
        self._stack.append(tuple(self._take_to_mark()))

    def _make_tuple_of_1(self, start: int, end: int) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _make_tuple_of_2(self, start: int, end: int) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _make_tuple_of_3(self, start: int, end: int) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _push_list(self, start: int, end: int) -> None:
        self._stack.append([])

    def _make_list(self, start: int, end: int) -> None:
        self._stack.append(self._take_to_mark())

    def _append(self, start: int, end: int) -> None:
        item = self._stack.pop()
        self._extend_list([item])

    def _appends(self, start: int, end: int) -> None:
        self._extend_list(self._take_to_mark())

    def _extend_list(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is list:
            self._stack[-1].extend(items)

    def _load_persistent(self, start: int, end: int) -> None:
        self.persistent_ids.append(self._stack.pop())
        self._stack.append(None)


_MEANINGS: dict[str, Callable[[PickleWalk, int, int], None]] = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"), PickleWalk._push_text),
    **dict.fromkeys(("BININT1", "BININT2"), PickleWalk._push_unsigned),
    **dict.fromkeys(("BININT", "LONG1", "LONG4"), PickleWalk._push_signed),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), PickleWalk._push_memo),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), PickleWalk._put_memo),
    "GET": PickleWalk._push_memo_line,
    "PUT": PickleWalk._put_memo_line,
    "MEMOIZE": PickleWalk._memoize,
    "GLOBAL": PickleWalk._push_global,
    "STACK_GLOBAL": PickleWalk._make_global,
    "MARK": PickleWalk._mark,
    "POP": PickleWalk._pop,
    "TUPLE": PickleWalk._make_tuple,
    "TUPLE1": PickleWalk._make_tuple_of_1,
    "TUPLE2": PickleWalk._make_tuple_of_2,
    "TUPLE3": PickleWalk._make_tuple_of_3,
    "EMPTY_LIST": PickleWalk._push_list,
    "LIST": PickleWalk._make_list,
    "APPEND": PickleWalk._append,
    "APPENDS": PickleWalk._appends,
    "BINPERSID": PickleWalk._load_persistent,
}

#: How many lines an argument has, and in how many bytes its length stands, by pickletools' code for it.
_TWO_LINES = -100
_LINES = {pickletools.UP_TO_NEWLINE: 1, _TWO_LINES: 2}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_CUT_OFF = "truncated checkpoint of torch's legacy format (a pickle in it is cut off)"


@dataclass(frozen=True, slots=True)
class _Operation:
    """What an opcode does to the machine.

    Attributes:
        argument_bytes: length of its argument; negative: a code for a length that stands in the file.
        takes_to_mark: it takes all stack items above the last mark.
        takes: stack items that it takes (below that mark).
        gives: stack items that it leaves.
        is_last: the pickle ends with it.
        meaning: what it does instead, where the result matters.
    """

    argument_bytes: int
    takes_to_mark: bool
    takes: int
    gives: int
    is_last: bool
    meaning: Callable[[PickleWalk, int, int], None] | None


def _operation(opcode: pickletools.OpcodeInfo) -> _Operation:
    argument_bytes = opcode.arg.n if opcode.arg is not None else 0
    if opcode.name in ("GLOBAL", "INST"):
        argument_bytes = _TWO_LINES
    takes_to_mark = pickletools.markobject in opcode.stack_before
    takes = opcode.stack_before.index(pickletools.markobject) if takes_to_mark else len(opcode.stack_before)
    meaning = _MEANINGS.get(opcode.name)
    gives = len(opcode.stack_after)
    return _Operation(argument_bytes, takes_to_mark, takes, gives, opcode.name == "STOP", meaning)


_OPERATIONS = {ord(opcode.code): _operation(opcode) for opcode in pickletools.opcodes}
