"""Pickles read as data: a tree of values and inert descriptions. Nothing is imported, looked up or called.

A pickle is a program for a small stack machine. This machine knows the opcodes that build data. A name (GLOBAL) must
be on the reader's list and becomes a `Global`, a pair of words; a call of it (REDUCE) becomes a `Call`: what
was to be called with what. The readers of tensor files recognise the few calls that describe tensors. Opcodes are
those of Python's pickletools, protocols 0 to 5.

Long strings, which are the values of tensors, are not read: they become a `Stored`, a place in the file.
So a pickle of 30 GB is read in the time and memory of its names and shapes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from blip2.tensorfiles.errors import UnsafeFileError, quoted
from blip2.tensorfiles.filebytes import FileBytes

SHORT = 1024  # bytes; longer strings stay in the file
MAX_OPCODES = 500_000  # some 40 a tensor: the 6.7B model of 1,247 tensors takes 50,000
MAX_TEXT_BYTES = 16 << 20  # of short strings together
MAX_LINE = 4096  # of the text opcodes of protocol 0
MAX_OPEN_MARKS = 100  # containers begun within containers
MAX_INTEGER_BYTES = 32

_BUFFER = 16 << 10


@dataclass(frozen=True)
class Stored:
    """A long string left in the file: bytes, or a text as UTF-8."""

    start: int
    length: int
    text: bool


@dataclass(frozen=True)
class Global:
    """The name of a class or function, and no more than that."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What the writer meant to be called: the function, its arguments, and what was set on the result."""

    function: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reference:
    """Something outside the pickle (a persistent id): torch keeps the values of tensors there."""

    id: Any


@dataclass(frozen=True)
class Pickle:
    """A pickle that was read: its value, its outside references, and where in the file it ends."""

    value: Any
    references: tuple[Reference, ...]
    end: int


def read_pickle(
    file: FileBytes, start: int, end: int, allowed: frozenset[Global], *, references: bool = False
) -> Pickle:
    """Read the pickle that begins at `start`.

    Args:
        end: where the file's part ends in which the pickle must end.
        allowed: the names it may mention.
        references: whether it may refer to things outside itself.

    Returns:
        A tree of None, bool, int, float, str, bytes, tuple, list, dict (keys are short strings or integers), and of the
        classes above. A set is read as a list. The same object may occur at several places, even within itself: do not
        walk it without a bound.

    Raises:
        UnsafeFileError: it mentions a name that is not allowed, or has opcodes that make objects.
        BrokenFileError: it is cut short or makes no sense.
        UnsupportedFileError: it is larger than any tensor file's.
    """
    return _Machine(file, start, end, allowed, references).run()


def as_dict(value: Any) -> dict[Any, Any] | None:
    """The entries of a dict or an OrderedDict; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Call) and value.function == ORDERED_DICT and not value.arguments:
        return value.items
    return None


ORDERED_DICT = Global("collections", "OrderedDict")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")


def find_state_dict(value: Any, is_tensor: Callable[[Any], bool], file: FileBytes) -> dict[str, Any]:
    """A file's table of tensors: its dict of them, or the one under "model" or another of `WRAPPERS`.

    What is beside tensors (counters, name tables) and beside the wrapped dict (optimizer, settings) is left out.
    """
    outer = as_dict(value)
    if outer is None:
        raise file.unsupported(
            f"it holds {quoted(value)}, expected a dict of tensors; save the model's state dict"
        )
    tables = {}
    for wrapper, table in [("", outer), *((key, as_dict(outer.get(key))) for key in WRAPPERS)]:
        if entries := {name: entry for name, entry in (table or {}).items() if is_tensor(entry)}:
            tables[wrapper] = entries
    if len(tables) > 1:
        raise file.unsupported(
            f"it holds tensors in several places "
            f"({', '.join(repr(key) if key else 'outside' for key in tables)}), so which are the model's is "
            "ambiguous; save the one state dict alone"
        )
    if not tables:
        if not outer:
            return {}
        raise file.unsupported(
            f"no tensors at its top nor under {', '.join(WRAPPERS)}; it holds "
            f"{', '.join(quoted(key) for key in list(outer)[:10])}: save the model's state dict alone"
        )
    (entries,) = tables.values()
    for name in entries:
        if not isinstance(name, str):
            raise file.unsupported(f"a tensor has the name {quoted(name)}; names must be strings")
    return entries


# --- the machine ---------------------------------------------------------------------------------------------------

_CONSTANTS: Mapping[int, Any] = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_INTEGERS: Mapping[int, str] = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i"}
# Opcode -> bytes of the length, and what follows: text, bytes, or a string of Python 2, which is either.
_STRINGS: Mapping[int, tuple[int, str]] = {
    ord("X"): (4, "text"),
    0x8C: (1, "text"),
    0x8D: (8, "text"),
    ord("B"): (4, "bytes"),
    ord("C"): (1, "bytes"),
    0x8E: (8, "bytes"),
    0x96: (8, "bytes"),  # a bytearray
    ord("T"): (4, "string"),
    ord("U"): (1, "string"),
}
_TUPLES: Mapping[int, int] = {0x85: 1, 0x86: 2, 0x87: 3}
# Bytes of the number of a memo's place; 0: the number is a line of text.
_PUTS: Mapping[int, int] = {ord("p"): 0, ord("q"): 1, ord("r"): 4}
_GETS: Mapping[int, int] = {ord("g"): 0, ord("h"): 1, ord("j"): 4}
_REFUSED: Mapping[int, str] = {
    ord("i"): "INST makes an object",
    ord("o"): "OBJ makes an object",
    0x81: "NEWOBJ makes an object",
    0x92: "NEWOBJ_EX makes an object",
    0x82: "EXT1 names something that only the writer's Python knows",
    0x83: "EXT2 names something that only the writer's Python knows",
    0x84: "EXT4 names something that only the writer's Python knows",
    ord("P"): "PERSID refers to something outside the file",
    0x97: "NEXT_BUFFER wants a buffer from outside the file",
    0x98: "READONLY_BUFFER wants a buffer from outside the file",
    ord("0"): "POP hides what was built, and no writer of tensors needs it",
    ord("1"): "POP_MARK hides what was built, and no writer of tensors needs it",
    ord("2"): "DUP is written by no writer of tensors",
}


class _Machine:
    def __init__(
        self, file: FileBytes, start: int, end: int, allowed: frozenset[Global], references: bool
    ) -> None:
        self.file, self.start, self.end = file, start, end
        self.allowed, self.may_refer = allowed, references
        self.position = self.buffer_start = start
        self.buffer = b""
        self.frame_end = start
        self.text_bytes = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.references: list[Reference] = []

    def run(self) -> Pickle:
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)[0]
            if opcode in _STRINGS:
                self.string(*_STRINGS[opcode])
            elif opcode in _PUTS:
                self.put(self.place(_PUTS[opcode]))
            elif opcode in _GETS:
                self.get(self.place(_GETS[opcode]))
            elif opcode in _INTEGERS:
                layout = _INTEGERS[opcode]
                self.stack.append(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])
            elif opcode in _TUPLES:
                self.stack.append(tuple(self.pop_many(_TUPLES[opcode])))
            elif opcode in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode])
            elif opcode in _HANDLERS:
                _HANDLERS[opcode](self)
            elif opcode == ord("."):
                value = self.pop()
                if self.stack or self.marks:
                    self.broken("it ends with more than one value")
                return Pickle(value, tuple(self.references), self.position)
            elif opcode in _REFUSED:
                self.unsafe(f"the opcode {_REFUSED[opcode]}")
            else:
                self.broken(f"{opcode:#04x} is no opcode")
        raise self.file.unsupported(
            f"its pickle has over {MAX_OPCODES:,} opcodes, more than any model's file"
        )

    # --- errors, bytes and the stack ---

    def broken(self, why: str) -> NoReturn:
        raise self.file.broken(f"a broken pickle, at byte {self.position:,}: {why}")

    def unsafe(self, why: str, requested: str = "") -> NoReturn:
        raise UnsafeFileError(
            f"{self.file.path}: refused, at byte {self.position:,}: {why}. Nothing was run. Ask for the model as "
            "safetensors, or save its plain state dict where the file comes from",
            requested,
        )

    def take(self, length: int) -> bytes:
        """The next bytes; `length` is small."""
        first = self.position - self.buffer_start
        if first + length > len(self.buffer):
            left = self.end - self.position
            if length > left:
                self.broken("it ends in the middle")
            self.buffer = self.file.read(self.position, min(left, max(length, _BUFFER)), "its pickle")
            self.buffer_start, first = self.position, 0
        self.position += length
        return self.buffer[first : first + length]

    def line(self) -> str:
        """The next line, of the text opcodes."""
        first = self.position - self.buffer_start
        stop = self.buffer.find(b"\n", first)
        if stop < 0:
            left = self.end - self.position
            self.buffer = self.file.read(self.position, min(left, _BUFFER), "its pickle")
            self.buffer_start, first = self.position, 0
            stop = self.buffer.find(b"\n")
        if not 0 <= stop - first <= MAX_LINE:
            self.broken(f"a line without an end, or of over {MAX_LINE} characters")
        self.count_text(stop - first)
        self.position += stop - first + 1
        return self.buffer[first:stop].decode("latin-1")

    def number(self, text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 2 * MAX_INTEGER_BYTES:
            self.broken(f"{quoted(text)} is no number")
        return int(text)

    def place(self, size: int) -> int:
        """A number of a place in the memo."""
        return int.from_bytes(self.take(size), "little") if size else self.number(self.line())

    def count_text(self, length: int) -> None:
        self.text_bytes += length
        if self.text_bytes > MAX_TEXT_BYTES:
            raise self.file.unsupported(
                f"its pickle holds over {MAX_TEXT_BYTES:,} bytes of names and settings, more than "
                "any model's file"
            )

    def pop_many(self, count: int) -> list[Any]:
        bottom = len(self.stack) - count
        if bottom < (self.marks[-1] if self.marks else 0):
            self.broken("it takes more values than it has")
        values = self.stack[bottom:]
        del self.stack[bottom:]
        return values

    def pop(self) -> Any:
        return self.pop_many(1)[0]

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            self.broken("it ends a container that was not begun")
        bottom = self.marks.pop()
        values = self.stack[bottom:]
        del self.stack[bottom:]
        return values

    # --- opcodes ---

    def protocol(self) -> None:
        if self.position != self.start + 1:
            self.broken("a second beginning")
        if (version := self.take(1)[0]) > 5:
            raise self.file.unsupported(f"a pickle of protocol {version}; known are 0 to 5")

    def frame(self) -> None:
        length = int.from_bytes(self.take(8), "little")
        if self.position < self.frame_end or length > self.end - self.position:
            self.broken(f"a frame of {length:,} bytes that does not fit where it is")
        self.frame_end = self.position + length

    def mark(self) -> None:
        if len(self.marks) >= MAX_OPEN_MARKS:
            self.broken(f"over {MAX_OPEN_MARKS} containers within each other")
        self.marks.append(len(self.stack))

    def string(self, size_of_length: int, kind: str) -> None:
        length = int.from_bytes(self.take(size_of_length), "little")
        if length > self.end - self.position:
            self.broken(f"a string of {length:,} bytes, more than are left")
        if length > SHORT:
            self.stack.append(Stored(self.position, length, kind == "text"))
            self.position += length
            return
        self.count_text(length)
        content = self.take(length)
        if kind == "bytes":
            self.stack.append(content)
        elif kind == "string":
            self.stack.append(content.decode("latin-1"))
        else:
            try:
                self.stack.append(content.decode("utf-8"))
            except UnicodeDecodeError:
                self.broken("a text that is no UTF-8")

    def text_line(self) -> None:
        text = self.line()
        if "\\" in text:
            self.broken("a text with escapes, as no writer of tensors makes")
        self.stack.append(text)

    def quoted_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            self.broken("a string with escapes or without quotes, as no writer of tensors makes")
        self.stack.append(text[1:-1])

    def integer_line(self) -> None:
        text = self.line()
        self.stack.append(text == "01" if text in ("00", "01") else self.number(text))

    def long_line(self) -> None:
        self.stack.append(self.number(self.line().removesuffix("L")))

    def long(self, size_of_length: int) -> None:
        length = int.from_bytes(self.take(size_of_length), "little")
        if length > MAX_INTEGER_BYTES:
            self.broken(f"an integer of {length:,} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def float_line(self) -> None:
        text = self.line()
        try:
            self.stack.append(float(text))
        except ValueError:
            self.broken(f"{quoted(text)} is no number")

    def float_bytes(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def put(self, place: int) -> None:
        if place in self.memo or not 0 <= place < MAX_OPCODES:
            self.broken(f"it writes place {quoted(place)} of its memo, which is taken or absurd")
        self.memo[place] = self.top()

    def get(self, place: int) -> None:
        if place not in self.memo:
            self.broken(f"it reads place {quoted(place)} of its memo, where nothing is")
        self.stack.append(self.memo[place])

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            self.broken("it appends to what is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        entries = as_dict(self.top())
        if entries is None or len(values) % 2:
            self.broken("it sets entries of what is no dict, or half an entry")
        for key, value in zip(values[::2], values[1::2]):
            # Nothing else is hashed: equal hashes and tuples within tuples can be made to take for ever.
            if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
                self.broken(f"{quoted(key)} as a name; names are short strings or integers")
            if key in entries:
                self.broken(f"the name {quoted(key)} occurs twice in a dict")
            entries[key] = value

    def make_dict(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self.unsafe("a name made of other things than texts")
        value = Global(module, name)
        if value not in self.allowed:
            self.unsafe(f"it asks for {quoted(str(value))}, which no tensor needs", str(value))
        self.stack.append(value)

    def call(self) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self.unsafe("it calls something that is no name, or with no proper arguments")
        self.stack.append(Call(function, arguments))

    def build(self) -> None:
        target, state = self.pop_many(2)
        if not isinstance(target, Call) or target.state is not None:
            self.unsafe("it sets the state of something that has none, or has it already")
        target.state = state
        self.stack.append(target)

    def refer(self) -> None:
        if not self.may_refer:
            self.unsafe("it refers to something outside itself")
        self.references.append(Reference(self.pop()))
        self.stack.append(self.references[-1])


_HANDLERS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("V"): _Machine.text_line,
    ord("S"): _Machine.quoted_line,
    ord("I"): _Machine.integer_line,
    ord("L"): _Machine.long_line,
    0x8A: lambda machine: machine.long(1),
    0x8B: lambda machine: machine.long(4),
    ord("F"): _Machine.float_line,
    ord("G"): _Machine.float_bytes,
    0x94: lambda machine: machine.put(len(machine.memo)),
    ord("]"): lambda machine: machine.stack.append([]),
    ord("}"): lambda machine: machine.stack.append({}),
    0x8F: lambda machine: machine.stack.append([]),  # a set
    ord("l"): lambda machine: machine.stack.append(machine.pop_to_mark()),
    ord("d"): lambda machine: machine.make_dict(machine.pop_to_mark()),
    ord("t"): lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    0x91: lambda machine: machine.stack.append(machine.pop_to_mark()),  # a frozenset
    ord("a"): lambda machine: machine.append(machine.pop_many(1)),
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),
    0x90: lambda machine: machine.append(machine.pop_to_mark()),  # to a set
    ord("s"): lambda machine: machine.set_items(machine.pop_many(2)),
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    0x93: lambda machine: machine.name(*machine.pop_many(2)),
    ord("R"): _Machine.call,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.refer,
}
