"""Damaged files, and what reading one may do: give a result, or one clear line, in little time and memory."""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minivit.errors import UserError

SECONDS = 2.0
MEMORY = 500 << 20  # bytes above those that a process has already
LINE = 300  # characters
VALUES = (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged versions of a file: bytes changed, cut off, taken out, doubled, moved, and put in; one to four of these each."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        damaged = data
        for _ in range(rng.integers(1, 5)):
            damaged = _damage(damaged, rng)
        yield damaged


def _damage(data: bytes, rng: np.random.Generator) -> bytes:
    if not data:
        return bytes(rng.integers(0, 256, 4, np.uint8))
    # Half of all changes lie in the first 256 bytes, where headers are.
    at = int(rng.integers(0, min(len(data), 256) if rng.random() < 0.5 else len(data)))
    end = min(len(data), at + int(rng.integers(1, 33)))
    match rng.integers(0, 8):
        case 0:
            return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(0, 8)))]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes(rng.integers(0, 256, end - at, np.uint8)) + data[end:]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[end:]
        case 4:
            return data[:end] + data[at:]
        case 5:
            other = int(rng.integers(0, len(data)))
            return data[:at] + data[other : other + end - at] + data[end:]
        case 6:
            value = VALUES[rng.integers(0, len(VALUES))]
            return data[:at] + value + data[at + len(value) :]
        case _:
            return data[:at] + VALUES[rng.integers(0, len(VALUES))] + data[at:]


# What replaces a value of JSON. A text that begins with RAW stands for what follows it, without quotes.
RAW = "\u2029"
VALUES_OF_JSON = (None, True, "text", "", [], {}, [[0.5]], {"a": 1}, -1, 0, 1, 0.5, 3, 1e30, -1e300, 10**8, 2**31, 2**64, "\ud800", "a\nb")
RAW_JSON = ("1e999", "-1e999", "NaN", "Infinity", "[" * 10_000, "[" * 10_000 + "]" * 10_000, "9" * 5_000, "0." + "9" * 5_000, "]", "")


def json_mutations(value: Any, count: int, seed: int) -> Iterator[str]:
    """`count` damaged versions of a value as JSON text, in each of which one to three parts are replaced, taken out or put in twice."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        whole = [json.loads(json.dumps(value))]
        for _ in range(rng.integers(1, 4)):
            places = [*_places(whole)]
            holder, key = places[rng.integers(0, len(places))]
            match rng.integers(0, 5):
                case 0 if holder is not whole:
                    del holder[key]
                case 1 if isinstance(holder, list):
                    holder.insert(key, holder[key])
                case 2 | 3:
                    holder[key] = RAW + RAW_JSON[rng.integers(0, len(RAW_JSON))]
                case _:
                    holder[key] = copy.deepcopy(VALUES_OF_JSON[rng.integers(0, len(VALUES_OF_JSON))])
        text = json.dumps(whole[0])
        for raw in RAW_JSON:
            text = text.replace(json.dumps(RAW + raw), raw)
        yield text


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """(list or dict, index or key) of every value inside."""
    for key in [*range(len(holder))] if isinstance(holder, list) else [*holder]:
        yield holder, key
        if isinstance(holder[key], (list, dict)):
            yield from _places(holder[key])


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Within the block, this process can get at most `size` more bytes of memory: more raises MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def twice_its_memory(read: Callable[[], object]) -> int:
    """Twice the bytes that read() takes of a file that is not damaged: a power of two, and at least 2 MiB."""
    size = 2**20
    while True:
        try:
            with memory_limit(size):
                with_enough_memory(read)()
            return 2 * size
        except (MemoryError, AssertionError, OSError):
            assert size < MEMORY, "it takes too much memory undamaged"
            size *= 2


def with_enough_memory(read: Callable[[], object]) -> Callable[[], object]:
    """read, but it fails where its UserError says no more than that memory ran out: a `memory_limit` finds that out, no user has one."""

    def checked() -> object:
        try:
            return read()
        except UserError as error:
            assert not isinstance(error.__cause__, MemoryError), error
            raise

    return checked


def check_outcome(read: Callable[[], object], what: str) -> bool:
    """Calls read(): it must return, or raise UserError with one printable line, within SECONDS. Returns whether it returned.

    A shared processor may stand still for seconds, and its time is counted on: what took too long is read a second time.
    what: names the damaged file in the message of a failure.
    """
    for _ in range(2):
        start = time.process_time()
        done = _returns(read, what)
        if (seconds := time.process_time() - start) < SECONDS:
            return done
    raise AssertionError(f"{what}: {seconds:.1f} s")


def _returns(read: Callable[[], object], what: str) -> bool:
    try:
        read()
    except UserError as error:
        line = str(error)
        assert line.isprintable() and 0 < len(line) <= LINE, (what, line)
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    return True


def outcome(read: Callable[[], object]) -> str:
    """The line of the UserError that read() raises, or "", after `check_outcome` in a process of its own that may take MEMORY more."""

    def run() -> None:
        line = ""

        def recorded() -> None:
            nonlocal line
            try:
                with_enough_memory(read)()
            except UserError as error:
                line = str(error)
                raise

        try:
            with memory_limit(MEMORY):
                check_outcome(recorded, "a bomb")
        except BaseException as error:
            line = f"FAILED: {error!r}"
        answer.send(line)

    context = multiprocessing.get_context("fork")
    result, answer = context.Pipe(duplex=False)
    process = context.Process(target=run)
    process.start()
    line = result.recv() if result.poll(30) else "FAILED: it hangs"
    process.kill()
    process.join()
    assert not line.startswith("FAILED"), line
    return line
