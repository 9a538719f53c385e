"""Pickles of plain values and of arrays of bytes, as in CIFAR's files, read without an unpickler.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program names. This one knows the opcodes that
lists of numbers and arrays of bytes need (protocols 2 to 4, `pickletools` describes them), and calls nothing but the three functions of
`CALLS`. What it builds is a tree with shared parts: who reads it must not walk it without looking at types, since a list can hold itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MOST_OPCODES = 1 << 19  # the largest official file has about 200,000
LONGEST_LINE = 64  # bytes of the name of a module or function
ROW = 3072  # bytes of an image


class Name(NamedTuple):
    """What a pickle calls by its module and name."""

    module: str
    name: str


class Array:
    """A pickled numpy.ndarray: its unchecked state."""

    state: Any = ()

    def rows(self, count: int) -> np.ndarray:
        """The (count, ROW) uint8 array in the state. Raises ValueError if it has another shape or dtype."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("its pixels are not an array")
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, DType) or dtype.code not in ("u1", b"u1") or fortran is not False or not isinstance(raw, bytes):
            raise ValueError("its pixels are not an array of bytes in C order")
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int for n in shape):
            raise ValueError("its pixels are not an array of two dimensions")
        if shape != (count, ROW) or len(raw) != count * ROW:
            raise ValueError(f"it holds {count} labels, but pixels of shape {shape} in {len(raw)} bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape)


class DType:
    """A pickled numpy.dtype: its code. Byte order and the like, its state, do not apply to bytes."""

    state: Any = ()

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code


class _Machine:
    """The stack machine, which runs one pickle."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.content, self.at = memoryview(content), 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.room = len(content)  # bytes that may still be encoded: a text can be named often, but no file does

    def run(self) -> Any:
        for _ in range(MOST_OPCODES):
            code = self.number(1)
            if code == pickle.STOP[0]:
                return self.stack.pop()
            if code not in BY_CODE:
                raise ValueError(f"it has the opcode {code:#04x}, which no CIFAR batch needs")
            BY_CODE[code](self)
        raise ValueError(f"it has more than {MOST_OPCODES:,} opcodes")

    def take(self, size: int) -> memoryview:
        if size > len(self.content) - self.at:
            raise ValueError("it ends too early")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        text, end, _ = bytes(self.content[self.at : self.at + LONGEST_LINE]).partition(b"\n")
        self.take(len(text) + len(end))
        return text.decode()

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def top(self, *kinds: type) -> Any:
        if type(self.stack[-1]) not in kinds:
            raise ValueError(f"it fills a {type(self.stack[-1]).__name__} as if it were a {kinds[0].__name__}")
        return self.stack[-1]

    def append(self) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def extend(self) -> None:
        items = self.since_mark()
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        if not all(isinstance(key, (str, bytes)) for key in keys):
            raise ValueError("it has a dictionary whose keys are not text")
        self.top(dict).update(zip(keys, items[1::2]))

    def name(self, module: Any, name: Any) -> None:
        known = Name(module, name)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it asks for a function whose name is no text")
        if known != NDARRAY and known not in CALLS:
            raise ValueError(f"it asks for {module[:40]}.{name[:40]}, which no CIFAR batch needs")
        self.stack.append(known)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function not in CALLS or type(arguments) is not tuple:
            raise ValueError("it calls what is no function")
        self.stack.append(CALLS[function](self, *arguments))

    def build(self) -> None:
        state = self.stack.pop()
        self.top(Array, DType).state = state

    def encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """_codecs.encode, with which Python 3 pickles bytes in protocol 2."""
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("it encodes what is no text in latin1")
        self.room -= len(text)
        if self.room < 0:
            raise ValueError("it encodes more text than it holds")
        return text.encode("latin1")


NDARRAY = Name("numpy", "ndarray")
CALLS: dict[Name, Callable[..., Any]] = {
    Name("numpy.core.multiarray", "_reconstruct"): lambda machine, *_: Array(),
    Name("numpy._core.multiarray", "_reconstruct"): lambda machine, *_: Array(),
    Name("numpy", "dtype"): lambda machine, *arguments: DType(*arguments),
    Name("_codecs", "encode"): _Machine.encode,
}


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _last(count: int) -> Callable[[_Machine], tuple[Any, ...]]:
    """The last `count` values of the stack, taken off."""
    return lambda machine: tuple(reversed([machine.stack.pop() for _ in range(count)]))


def _text(machine: _Machine, width: int) -> str:
    return str(machine.take(machine.number(width)), "utf-8", "surrogatepass")


def _remember(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _signed(machine: _Machine, width: int) -> int:
    return int.from_bytes(machine.take(width), "little", signed=True)


OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.NONE: _push(lambda m: None),
    pickle.NEWTRUE: _push(lambda m: True),
    pickle.NEWFALSE: _push(lambda m: False),
    pickle.BININT: _push(lambda m: _signed(m, 4)),
    pickle.BININT1: _push(lambda m: m.number(1)),
    pickle.BININT2: _push(lambda m: m.number(2)),
    pickle.LONG1: _push(lambda m: _signed(m, m.number(1))),
    pickle.SHORT_BINSTRING: _push(lambda m: bytes(m.take(m.number(1)))),
    pickle.BINSTRING: _push(lambda m: bytes(m.take(m.number(4)))),
    pickle.SHORT_BINBYTES: _push(lambda m: bytes(m.take(m.number(1)))),
    pickle.BINBYTES: _push(lambda m: bytes(m.take(m.number(4)))),
    pickle.BINBYTES8: _push(lambda m: bytes(m.take(m.number(8)))),
    pickle.SHORT_BINUNICODE: _push(lambda m: _text(m, 1)),
    pickle.BINUNICODE: _push(lambda m: _text(m, 4)),
    pickle.BINUNICODE8: _push(lambda m: _text(m, 8)),
    pickle.EMPTY_LIST: _push(lambda m: []),
    pickle.EMPTY_DICT: _push(lambda m: {}),
    pickle.EMPTY_TUPLE: _push(lambda m: ()),
    pickle.TUPLE1: _push(_last(1)),
    pickle.TUPLE2: _push(_last(2)),
    pickle.TUPLE3: _push(_last(3)),
    pickle.TUPLE: _push(lambda m: tuple(m.since_mark())),
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.SETITEM: lambda m: m.set_items([*_last(2)(m)]),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    pickle.BINPUT: lambda m: _remember(m, m.number(1)),
    pickle.LONG_BINPUT: lambda m: _remember(m, m.number(4)),
    pickle.MEMOIZE: lambda m: _remember(m, len(m.memo)),
    pickle.BINGET: _push(lambda m: m.memo[m.number(1)]),
    pickle.LONG_BINGET: _push(lambda m: m.memo[m.number(4)]),
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(*_last(2)(m)),
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
}
BY_CODE = {code[0]: function for code, function in OPCODES.items()}


def load_plain(content: bytes | bytearray) -> Any:
    """The value of a pickle. Raises ValueError, LookupError or TypeError for one that is damaged, or asks for more than CIFAR needs."""
    return _Machine(content).run()
