"""python -m benchmarks.kills: trainings that are killed at random moments, again and again, and resumed; how many end with the same bits.

Each training of a small model on digits is killed by SIGKILL after a random time or at a random change of its files, and resumed, until it
is complete. Its weights, its last checkpoint (optimizer, average, random state, best weights) and its history, without times, are then
compared with those of a training that was never stopped. Checkpoints are written after every step, so that kills meet them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minivit
from minivit import UserError
from minivit.io.checkpoints import Checkpoints
from minivit.io.run_folder import MODEL, PART, RunFolder
from minivit.io.weights import read_safetensors
from minivit.training import checkpoints

from .measure import machine, machine_line, option_parser, table, write_result

TRAININGS, TINY_TRAININGS, MOST_KILLS = 100, 2, 6
TIMES = ("seconds", "images_per_second")  # of a line of metrics
OPTIONS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 24,
    "limit": 96,
    "ema": 0.8,
    "drop_path": 0.1,
    "validation_fraction": 0.25,
    "precision": "float32",
    "model_options": {"dim": 8, "depth": 1, "heads": 1},
}


def train(out: Path) -> int:
    """Begin the training, or go on with it; the exit status."""
    try:
        begun = out.is_dir() and any(path.name != PART for path in out.iterdir())
        options = {"resume": out} if begun else {**OPTIONS, "out": out}
        minivit.train(**options, progress=False, threads=1, keep_checkpoint=True, checkpoint_minutes=1e-9)
    except UserError as error:
        return 0 if "is complete" in str(error) else 2
    return 0


def in_a_child(action: Callable[[], int]) -> int:
    """The process id of a copy of this process that ends with the status action()."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
                checkpoints.EPOCH_SECONDS, checkpoints.SHARE = 0.0, float("inf")
                status = action()
        finally:
            os._exit(status)  # a copy must not go on
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_change(number: int, out: Path) -> Callable[[], int]:
    """A training that kills itself at this change of its files."""

    def action() -> int:
        changes = []

        def watch(event: str, arguments: Any) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(arguments[0]).startswith(str(out)):
                changes.append(event)
                if len(changes) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        return train(out)

    return action


def train_with_kills(out: Path, rng: np.random.Generator, seconds: float, changes: int = 150) -> int:
    """How often a training into `out` was killed, at most MOST_KILLS times, within `seconds` or `changes` of files; it is complete then."""
    kills = 0
    while True:
        if kills < MOST_KILLS and rng.integers(2):
            status = status_of(in_a_child(killed_at_change(int(rng.integers(1, changes)), out)))
        else:
            pid = in_a_child(lambda: train(out))
            if kills < MOST_KILLS:
                time.sleep(float(rng.uniform(0, seconds)))
                os.kill(pid, signal.SIGKILL)
            status = status_of(pid)
        if status != -signal.SIGKILL:
            break
        kills += 1
    if status:
        raise RuntimeError(f"a training into {out} ended with status {status}")
    return kills


def result_of(out: Path) -> tuple[Any, ...]:
    """All that a complete run says, without times, in a form that can be compared."""
    checkpoint = Checkpoints(out).latest()
    assert checkpoint
    history = [{key: value for key, value in line.items() if key not in TIMES} for line in RunFolder(out).read_metrics()]
    arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in checkpoint.arrays.items()}
    weights, metadata = read_safetensors(out / MODEL)
    return checkpoint.step, arrays, history, {name: array.tobytes() for name, array in weights.items()}, metadata


def measure(folder: Path, trainings: int, seed: int = 0) -> dict[str, Any]:
    """How many trainings were killed how often, and how many ended like the one that was not."""
    whole = folder / "whole"
    train(folder / "warm")  # compiles, loads and imports for all children
    start = time.perf_counter()
    if status_of(in_a_child(lambda: train(whole))):
        raise RuntimeError("the training without kills failed")
    seconds, expected, kills, equal = time.perf_counter() - start, result_of(whole), [], 0
    for number in range(trainings):
        out = folder / f"killed{number}"
        kills.append(train_with_kills(out, np.random.default_rng([seed, number]), seconds))
        equal += result_of(out) == expected
        shutil.rmtree(out)
    return {"trainings": trainings, "kills": sum(kills), "not killed": kills.count(0), "equal": equal}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("kills", "Trainings that are killed and resumed: how many end with the same bits.")
    parser.add_argument("--trainings", type=int, default=TRAININGS, help="how many are killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args(arguments)
    found = machine()
    print(machine_line(found))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), TINY_TRAININGS if options.tiny else options.trainings, options.seed)
    print(table(dict.fromkeys(result, ">"), [[str(value) for value in result.values()]]))
    write_result(options, "kills", found, results=[result])
    return 0 if result["equal"] == result["trainings"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
