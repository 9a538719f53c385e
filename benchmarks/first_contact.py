"""python -m benchmarks.first_contact: everything that is to be learnt on a GPU that is there for minutes only, in one run.

Stages run one after another, each in a process of its own that is ended at its time limit: a stage that hangs or fails costs itself alone.
Every line is printed at once, and the JSON file is written anew after each entry. docs/gpu.md says how to run it and how to read it.

`--compile FOLDER` compiles the kernels without a GPU; with `--kernels FOLDER` the run takes them from there, and keeps there which
algorithms of cuBLASLt it chose. With `--tiny` and no GPU the stages run in the tests' emulation.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple, TextIO

from minivit.files import atomic_file

from .measure import machine, table

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "\x1e"  # begins a line of a stage's process that is an entry, as JSON
LEAST = 3.0  # seconds that must be left for a stage to begin


class Stage(NamedTuple):
    """A generator function of entries, as module:function, and the seconds that it may take."""

    function: str
    limit: float


STAGES = {  # name -> stage, in the order in which they run
    "probe": Stage("benchmarks.contact_stages:probe", 40),
    "products": Stage("benchmarks.contact_products:products", 45),
    "ops": Stage("benchmarks.contact_stages:ops", 100),
    "plans": Stage("benchmarks.contact_stages:plans", 90),
    "memcheck": Stage("benchmarks.contact_stages:memcheck", 60),
    "profile 128": Stage("benchmarks.contact_stages:profile_small", 40),
    "profile 1024": Stage("benchmarks.contact_stages:profile_large", 40),
    "steps 128": Stage("benchmarks.contact_stages:steps_small", 100),
    "steps 1024": Stage("benchmarks.contact_stages:steps_large", 100),
    "alone": Stage("benchmarks.contact_stages:alone", 60),
    "choices": Stage("benchmarks.contact_products:choices", 60),
    "recipe": Stage("benchmarks.contact_stages:recipe", 480),
}
COLUMNS = {"stage": "<", "how it ended": "<", "s": ">", "entries": ">", "what it found": "<"}


class Report:
    """What is known so far, written anew with every addition."""

    def __init__(self, path: Path | None, options: argparse.Namespace) -> None:
        self.path, self.start = path, perf_counter()
        self.content: dict[str, Any] = {"benchmark": "first_contact", "machine": machine(), "tiny": options.tiny, "stages": {}}

    def seconds(self) -> float:
        return perf_counter() - self.start

    def say(self, line: str) -> None:
        print(f"[{self.seconds():6.1f} s] {line}", flush=True)

    def write(self) -> None:
        if self.path:
            with atomic_file(self.path) as file:
                file.write((json.dumps(self.content, indent=1, ensure_ascii=False) + "\n").encode())


def run_stage(name: str, stage: Stage, limit: float, report: Report, options: argparse.Namespace) -> None:
    """Run a stage in a process of its own for at most `limit` seconds, and add what it finds to the report."""
    found = report.content["stages"][name] = {"status": "running", "limit": limit, "entries": []}
    report.write()
    start, last = perf_counter(), list[str]()
    process, lines = begin(stage.function, options.tiny, options.data, limit)

    def read() -> None:
        for line in lines:
            if line.startswith(ENTRY):
                found["entries"].append(json.loads(line[1:]))
                report.write()
                report.say(f"{name}: {in_words(found['entries'][-1])}")
            else:
                last.append(line.rstrip())
                report.say(f"{name}| {line.rstrip()}")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    ended = end(process, start + limit)
    reader.join(5)
    found |= {"status": ended, "seconds": perf_counter() - start} | ({"output": last[-20:]} if ended != "ended" else {})
    report.write()
    report.say(f"{name}: {ended} after {found['seconds']:.1f} s")


def begin(function: str, tiny: bool, data: Path | None, limit: float) -> tuple[int, TextIO]:
    """Begin a stage in a copy of this process, which has imported everything and never touches a GPU: its number, and what it prints."""
    from . import contact_products, contact_stages  # noqa: F401

    readable, writable = os.pipe()
    process = os.fork()
    if process:
        os.close(writable)
        return process, open(readable, errors="replace")
    status = 1
    try:
        os.setsid()
        os.dup2(writable, 1)
        os.dup2(writable, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", 1, closefd=False)
        run_one(function, tiny, data, limit)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(process: int, deadline: float) -> str:
    """Wait until the deadline for a process, and end it with all that it began: how it ended."""
    ended, status = 0, 0
    while not ended and perf_counter() < deadline:
        sleep(0.02)
        ended, status = os.waitpid(process, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if not ended:
        os.waitpid(process, 0)
        return "stopped at its limit"
    return "ended" if status == 0 else f"failed ({os.waitstatus_to_exitcode(status)})"


def in_words(entry: Mapping[str, Any]) -> str:
    """An entry in one line; long parts are in the JSON file alone."""
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items())
    return ", ".join(part for part in parts if len(part) < 100)


def summary(stages: Mapping[str, Any]) -> str:
    rows = []
    for name, found in stages.items():
        wrong = sum(entry.get("right") is False for entry in found["entries"])
        what = f"{wrong} WRONG" if wrong else next((entry["result"] for entry in reversed(found["entries"]) if "result" in entry), "")
        rows.append([name, found["status"], f"{found.get('seconds', 0):.1f}", str(len(found["entries"])), what])
    return table(COLUMNS, rows)


def run_one(function: str, tiny: bool, data: Path | None, seconds: float) -> None:
    """In a stage's process: print its entries."""
    from . import contact_stages

    module, name = function.split(":")
    with contact_stages.device(tiny):
        for entry in getattr(import_module(module), name)(contact_stages.Setting(tiny, data, seconds)):
            print(ENTRY + json.dumps(entry), flush=True)


def main(arguments: Sequence[str] | None = None, stages: Mapping[str, Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.first_contact", description="All that is to be learnt on a GPU, in one run.")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show whether it works; emulated without a GPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what is found there, anew after each entry")
    parser.add_argument("--deadline", type=float, default=480.0, metavar="SECONDS", help="of the whole run (default: %(default).0f)")
    parser.add_argument("--stages", metavar="NAMES", help="separated by commas; default: all")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images for the last stage, as --data of minivit train")
    parser.add_argument("--kernels", type=Path, metavar="FOLDER", help="the cache folder for compiled kernels")
    parser.add_argument("--compile", type=Path, metavar="FOLDER", help="only compile the kernels of all stages into this cache folder")
    parser.add_argument("--architecture", default="sm_90", help="for --compile (default: %(default)s)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # run this function's stage here
    options = parser.parse_args(arguments)
    if options.stage:
        run_one(options.stage, options.tiny, options.data, options.deadline)
        return 0
    if options.compile:
        from .contact_stages import compile_kernels

        os.environ["XDG_CACHE_HOME"] = str(options.compile.resolve())
        print(f"{compile_kernels(options.architecture, options.tiny)} kernels for {options.architecture} are in {options.compile}")
        return 0
    if options.kernels:
        use_kernels(options.kernels.resolve())
    wanted = options.stages.split(",") if options.stages else list(stages)
    if unknown := set(wanted) - set(stages):
        parser.error(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(stages)}")
    report = Report(options.json, options)
    for name in wanted:
        left = options.deadline - report.seconds()
        if left < LEAST:
            report.content["stages"][name] = {"status": "not begun: no time left", "entries": []}
            continue
        run_stage(name, stages[name], min(stages[name].limit, left), report, options)
    report.content["seconds"] = report.seconds()
    report.write()
    print(summary(report.content["stages"]), flush=True)
    return 0 if all(found["status"] == "ended" for found in report.content["stages"].values()) else 1


def use_kernels(folder: Path) -> None:
    """Take compiled kernels from a folder that was made elsewhere: on the way it may have become one that others may write to."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    for path in (folder / "minivit", *(folder / "minivit").rglob("*")):
        if path.is_dir():
            path.chmod(0o700)


if __name__ == "__main__":
    raise SystemExit(main())
