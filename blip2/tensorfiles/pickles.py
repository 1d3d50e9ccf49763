"""Pickles read as data: a tree of values and inert descriptions. Nothing is imported, looked up or called.

A pickle is a program for a small stack machine. This machine knows the opcodes that build data. A name (GLOBAL) must
be on the reader's list and becomes a `Global`, a pair of words; a call of it (REDUCE) becomes a `Call`: what
was to be called with what. The readers of tensor files recognise the few calls that describe tensors. Opcodes are
those of Python's pickletools, protocols 0 to 5.

Long strings, which are the values of tensors, are not read: they become a `Stored`, a place in the file.
So a pickle of 30 GB is read in the time and memory of its names and shapes.
"""

from __future__ import annotations

import pickletools
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


def find_tensors(value: Any, is_tensor: Callable[[Any], bool], file: FileBytes) -> dict[str, Any]:
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

# Why an opcode is refused, by the opcodes.
_REFUSED: Mapping[bytes, str] = {
    b"io\x81\x92": "makes an object",
    b"\x82\x83\x84": "names something that only the writer's Python knows",
    b"P": "refers to something outside the file",
    b"\x97\x98": "wants a buffer from outside the file",
    b"01": "hides what was built, and no writer of tensors needs it",
    b"2": "is written by no writer of tensors",
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
            opcode = self.take(1)
            if opcode in _OPCODES:
                method, *arguments = _OPCODES[opcode]
                method(self, *arguments)
            elif opcode == b".":
                (value,) = self.pop(1)
                if self.stack or self.marks:
                    self.broken("it ends with more than one value")
                return Pickle(value, tuple(self.references), self.position)
            else:
                self.refuse(opcode)
        raise self.file.unsupported(
            f"its pickle has over {MAX_OPCODES:,} opcodes, more than any model's file"
        )

    # --- errors, bytes and the stack ---

    def refuse(self, opcode: bytes) -> NoReturn:
        for opcodes, reason in _REFUSED.items():
            if opcode in opcodes:
                name = next(o.name for o in pickletools.opcodes if o.code == opcode.decode("latin-1"))
                self.unsafe(f"the opcode {name} {reason}")
        self.broken(f"{opcode[0]:#04x} is no opcode")

    def broken(self, why: str) -> NoReturn:
        raise self.file.broken(f"a broken pickle, at byte {self.position:,}: {why}")

    def unsafe(self, why: str, requested: str = "") -> NoReturn:
        raise UnsafeFileError(
            f"{self.file.path}: refused, at byte {self.position:,}: {why}. Nothing was run. Ask for the model as "
            "safetensors, or save its plain state dict where the file comes from",
            requested,
        )

    def fill(self, least: int = 0) -> None:
        """Read on from the position."""
        length = min(self.end - self.position, max(least, _BUFFER))
        self.buffer, self.buffer_start = self.file.read(self.position, length, "its pickle"), self.position

    def take(self, length: int) -> bytes:
        """The next bytes; `length` is small."""
        if self.position + length > self.buffer_start + len(self.buffer):
            if length > self.end - self.position:
                self.broken("it ends in the middle")
            self.fill(length)
        first = self.position - self.buffer_start
        self.position += length
        return self.buffer[first : first + length]

    def line(self) -> str:
        """The next line, of the text opcodes."""
        if self.buffer.find(b"\n", self.position - self.buffer_start) < 0:
            self.fill()
        first = self.position - self.buffer_start
        length = self.buffer.find(b"\n", first) - first
        if not 0 <= length <= MAX_LINE:
            self.broken(f"a line without an end, or of over {MAX_LINE} characters")
        self.count_text(length)
        self.position += length + 1
        return self.buffer[first : first + length].decode("latin-1")

    def number(self, text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 2 * MAX_INTEGER_BYTES:
            self.broken(f"{quoted(text)} is no number")
        return int(text)

    def length(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def count_text(self, length: int) -> None:
        self.text_bytes += length
        if self.text_bytes > MAX_TEXT_BYTES:
            raise self.file.unsupported(
                f"its pickle holds over {MAX_TEXT_BYTES:,} bytes of names and settings, more than "
                "any model's file"
            )

    def pop(self, count: int | None = None) -> list[Any]:
        """The last values: so many of them, or those since the last mark, which goes."""
        if count is None:
            if not self.marks:
                self.broken("it ends a container that was not begun")
            bottom = self.marks.pop()
        else:
            bottom = len(self.stack) - count
            if bottom < (self.marks[-1] if self.marks else 0):
                self.broken("it takes more values than it has")
        values = self.stack[bottom:]
        del self.stack[bottom:]
        return values

    def top(self) -> Any:
        self.stack += (values := self.pop(1))
        return values[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # --- opcodes ---

    def protocol(self) -> None:
        if self.position != self.start + 1:
            self.broken("a second beginning")
        if (version := self.take(1)[0]) > 5:
            raise self.file.unsupported(f"a pickle of protocol {version}; known are 0 to 5")

    def frame(self) -> None:
        length = self.length(8)
        if self.position < self.frame_end or length > self.end - self.position:
            self.broken(f"a frame of {length:,} bytes that does not fit where it is")
        self.frame_end = self.position + length

    def mark(self) -> None:
        if len(self.marks) >= MAX_OPEN_MARKS:
            self.broken(f"over {MAX_OPEN_MARKS} containers within each other")
        self.marks.append(len(self.stack))

    def string(self, size_of_length: int, encoding: str = "") -> None:
        length = self.length(size_of_length)
        if length > self.end - self.position:
            self.broken(f"a string of {length:,} bytes, more than are left")
        if length > SHORT:
            self.push(Stored(self.position, length, encoding == "utf-8"))
            self.position += length
            return
        self.count_text(length)
        content = self.take(length)
        try:
            self.push(content.decode(encoding) if encoding else content)
        except UnicodeDecodeError:
            self.broken("a text that is no UTF-8")

    def text_line(self) -> None:
        text = self.line()
        if "\\" in text:
            self.broken("a text with escapes, as no writer of tensors makes")
        self.push(text)

    def quoted_line(self) -> None:
        text = self.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            self.broken("a string with escapes or without quotes, as no writer of tensors makes")
        self.push(text[1:-1])

    def integer_line(self) -> None:
        text = self.line()
        self.push(text == "01" if text in ("00", "01") else self.number(text))

    def long_line(self) -> None:
        self.push(self.number(self.line().removesuffix("L")))

    def long(self, size_of_length: int) -> None:
        length = self.length(size_of_length)
        if length > MAX_INTEGER_BYTES:
            self.broken(f"an integer of {length:,} bytes")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def float_line(self) -> None:
        text = self.line()
        try:
            self.push(float(text))
        except ValueError:
            self.broken(f"{quoted(text)} is no number")

    def fixed(self, layout: str) -> None:
        self.push(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def put(self, size: int | None) -> None:
        """Keep a value: the number of its place is of `size` bytes, a line of text (0), or the next (None)."""
        place = len(self.memo) if size is None else self.length(size) if size else self.number(self.line())
        if place in self.memo or not 0 <= place < MAX_OPCODES:
            self.broken(f"it writes place {quoted(place)} of its memo, which is taken or absurd")
        self.memo[place] = self.top()

    def get(self, size: int) -> None:
        place = self.length(size) if size else self.number(self.line())
        if place not in self.memo:
            self.broken(f"it reads place {quoted(place)} of its memo, where nothing is")
        self.push(self.memo[place])

    def collect(self, kind: type[list[Any]] | type[tuple[Any, ...]], count: int | None = None) -> None:
        self.push(kind(self.pop(count)))

    def append(self, count: int | None = None) -> None:
        values = self.pop(count)
        target = self.top()
        if not isinstance(target, list):
            self.broken("it appends to what is no list")
        target.extend(values)

    def make_dict(self, count: int | None = None) -> None:
        self.set_items({}, self.pop(count))

    def update(self, count: int | None = None) -> None:
        values = self.pop(count)
        self.set_items(self.pop(1)[0], values)

    def set_items(self, target: Any, values: list[Any]) -> None:
        self.push(target)
        entries = as_dict(target)
        if entries is None or len(values) % 2:
            self.broken("it sets entries of what is no dict, or half an entry")
        for key, value in zip(values[::2], values[1::2]):
            # Nothing else is hashed: equal hashes and tuples within tuples can be made to take for ever.
            if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
                self.broken(f"{quoted(key)} as a name; names are short strings or integers")
            if key in entries:
                self.broken(f"the name {quoted(key)} occurs twice in a dict")
            entries[key] = value

    def name(self, lines: bool) -> None:
        module, name = (self.line(), self.line()) if lines else self.pop(2)
        if type(module) is not str or type(name) is not str:
            self.unsafe("a name made of other things than texts")
        value = Global(module, name)
        if value not in self.allowed:
            self.unsafe(f"it asks for {quoted(str(value))}, which no tensor needs", str(value))
        self.push(value)

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self.unsafe("it calls something that is no name, or with no proper arguments")
        self.push(Call(function, arguments))

    def build(self) -> None:
        target, state = self.pop(2)
        if not isinstance(target, Call) or target.state is not None:
            self.unsafe("it sets the state of something that has none, or has it already")
        target.state = state
        self.push(target)

    def refer(self) -> None:
        if not self.may_refer:
            self.unsafe("it refers to something outside itself")
        self.references.append(Reference(*self.pop(1)))
        self.push(self.references[-1])


# Opcode -> the method that does it, and its arguments.
_OPCODES: Mapping[bytes, tuple[Any, ...]] = {
    b"\x80": (_Machine.protocol,), b"\x95": (_Machine.frame,), b"(": (_Machine.mark,),
    b"N": (_Machine.push, None), b"\x88": (_Machine.push, True), b"\x89": (_Machine.push, False),
    b"K": (_Machine.fixed, "<B"), b"M": (_Machine.fixed, "<H"), b"J": (_Machine.fixed, "<i"),
    b"G": (_Machine.fixed, ">d"), b"\x8a": (_Machine.long, 1), b"\x8b": (_Machine.long, 4),
    b"I": (_Machine.integer_line,), b"L": (_Machine.long_line,), b"F": (_Machine.float_line,),
    b"V": (_Machine.text_line,), b"S": (_Machine.quoted_line,),
    # bytes of the length, and what follows: text, bytes, or a string of Python 2, which is either
    b"X": (_Machine.string, 4, "utf-8"), b"\x8c": (_Machine.string, 1, "utf-8"), b"\x8d": (_Machine.string, 8, "utf-8"),
    b"B": (_Machine.string, 4), b"C": (_Machine.string, 1), b"\x8e": (_Machine.string, 8),
    b"\x96": (_Machine.string, 8),  # a bytearray
    b"T": (_Machine.string, 4, "latin-1"), b"U": (_Machine.string, 1, "latin-1"),
    b"p": (_Machine.put, 0), b"q": (_Machine.put, 1), b"r": (_Machine.put, 4), b"\x94": (_Machine.put, None),
    b"g": (_Machine.get, 0), b"h": (_Machine.get, 1), b"j": (_Machine.get, 4),
    # how many values; none: those since the mark
    b")": (_Machine.collect, tuple, 0), b"\x85": (_Machine.collect, tuple, 1), b"\x86": (_Machine.collect, tuple, 2),
    b"\x87": (_Machine.collect, tuple, 3), b"t": (_Machine.collect, tuple),
    b"]": (_Machine.collect, list, 0), b"l": (_Machine.collect, list),
    b"a": (_Machine.append, 1), b"e": (_Machine.append,),
    b"\x8f": (_Machine.collect, list, 0), b"\x91": (_Machine.collect, list), b"\x90": (_Machine.append,),  # sets
    b"}": (_Machine.make_dict, 0), b"d": (_Machine.make_dict,), b"s": (_Machine.update, 2), b"u": (_Machine.update,),
    b"c": (_Machine.name, True), b"\x93": (_Machine.name, False), b"R": (_Machine.call,), b"b": (_Machine.build,),
    b"Q": (_Machine.refer,),
}  # fmt: skip
