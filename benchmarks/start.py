"""python -m benchmarks.start: how long a newcomer waits.

Every run is a fresh process, timed from its start until it reports: `import minivit` (which must import neither Numba nor CuPy nor
matplotlib; measured inside, without Python's own start), and in each precision the first training step of vit_nano_patch2_8 on 64 images,
once with an empty kernel cache and then with the one that this left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

from .measure import Summary, machine, machine_line, option_parser, percent, table, write_result

ROOT = Path(__file__).resolve().parent.parent
CACHE_VARIABLE = {"darwin": "HOME", "win32": "LOCALAPPDATA"}.get(sys.platform, "XDG_CACHE_HOME")  # what the cache folder follows
IMPORT = """
import sys
from time import perf_counter
start = perf_counter()
import minivit
print(perf_counter() - start, *{"numba", "cupy", "matplotlib"} & set(sys.modules), flush=True)
"""
FIRST_STEP = """
import sys
import numpy as np
import minivit
rng = np.random.default_rng(0)
trainer = minivit.Trainer(minivit.create_model("vit_nano_patch2_8"), precision=sys.argv[1])
print(trainer.step(rng.standard_normal((64, 1, 8, 8), np.float32), rng.integers(0, 10, 64)), flush=True)
"""
PRECISIONS = "float32", "bf16x3", "bfloat16"
LIMITS = {
    "import minivit": 0.25,
    **{f"first step, {p}, empty kernel cache": 20.0 for p in PRECISIONS},  # seconds
    **{f"first step, {p}, warm kernel cache": 1.5 for p in PRECISIONS},
}
COLUMNS = {"": "<", "s": ">", "spread": ">", "CPU s": ">", "runs": ">", "limit, s": ">", "verdict": "<"}


class Run(NamedTuple):
    seconds: float  # from the start of a fresh process until its last line of output
    cpu_seconds: float  # of all its threads, until its end; other work on the machine hardly changes it
    words: list[str]  # of that line


def run(program: str, cache: str, *arguments: str) -> Run:
    """Raises CalledProcessError for a program that fails."""
    start, before = perf_counter(), os.times()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {CACHE_VARIABLE: cache}
    )
    assert process.stdout
    words, seconds = [], 0.0
    for line in process.stdout:
        words, seconds = line.split(), perf_counter() - start
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, program)
    after = os.times()
    return Run(seconds, after.children_user + after.children_system - before.children_user - before.children_system, words)


def time_import(cache: str) -> Run:
    """Raises RuntimeError where it imports what it should not."""
    found = run(IMPORT, cache)
    seconds, *heavy = found.words
    if heavy:
        raise RuntimeError(f"import minivit imports {', '.join(heavy)}")
    return found._replace(seconds=float(seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("start", "Time to import minivit and to its first training step.")
    parser.add_argument("--runs", type=int, default=7, help="of each but the first with an empty cache (default: %(default)s)")
    options = parser.parse_args(arguments)
    runs = 1 if options.tiny else options.runs
    found = machine()
    print(machine_line(found))
    with TemporaryDirectory() as cache:
        times = {"import minivit": [time_import(cache) for _ in range(runs)]}
    for precision in PRECISIONS[:1] if options.tiny else PRECISIONS:
        with TemporaryDirectory() as cache:
            times[f"first step, {precision}, empty kernel cache"] = [run(FIRST_STEP, cache, precision)]
            times[f"first step, {precision}, warm kernel cache"] = [run(FIRST_STEP, cache, precision) for _ in range(runs)]
    print(table(COLUMNS, [row(what, taken) for what, taken in times.items()]))
    results = {what: [{"seconds": r.seconds, "cpu_seconds": r.cpu_seconds} for r in taken] for what, taken in times.items()}
    write_result(options, "start", found, limits=LIMITS, results=results)
    return 0


def row(what: str, taken: Sequence[Run]) -> list[str]:
    found = Summary.of([r.seconds for r in taken])
    verdict = "kept" if found.median <= LIMITS[what] else "EXCEEDED"
    return [
        what,
        f"{found.median:.3f}",
        percent(found.spread) if len(taken) > 1 else "",
        f"{median(r.cpu_seconds for r in taken):.2f}",
        str(len(taken)),
        f"{LIMITS[what]:g}",
        verdict,
    ]


if __name__ == "__main__":
    raise SystemExit(main())
