"""python -m benchmarks.two_processes: a training step beside another process that trains too, against one that is alone.

On two cores, two processes of one thread each should hardly notice each other: 1.0 times as slow, or what memory they share. Two that use
all cores share these: 2.0 times, and more only where threads wait in vain. Each round takes both measurements, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from minivit import Trainer, create_model
from minivit.kernels.cpu import run
from minivit.training.profiling import repeat

from .measure import Summary, machine, machine_line, milliseconds, option_parser, table, write_result

MODEL, BATCH = "vit_tiny_patch4_32", 16
TINY_MODEL, TINY_BATCH = "vit_nano_patch2_8", 2
SECONDS, ROUNDS = 3.0, 5


def work(connection: Connection, threads: int, model: str, batch: int) -> None:
    """A process: trains for as many seconds as it is told, and tells the milliseconds of each step; None ends it."""
    trainer, rng = Trainer(create_model(model), threads=threads), np.random.default_rng(0)
    config = trainer.model.config
    images = rng.standard_normal((batch, *config.image_shape), np.float32)
    labels = rng.integers(0, config.num_classes, batch)
    trainer.step(images, labels)
    connection.send(None)
    while (seconds := connection.recv()) is not None:
        connection.send(repeat(lambda: trainer.step(images, labels), seconds))


def measure(threads: int, model: str, batch: int, seconds: float, rounds: int) -> dict[str, list[float]]:
    """The median seconds of a step in each round, alone and beside the other process (the mean of both)."""
    context = get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=work, args=(theirs, threads, model, batch), daemon=True) for _, theirs in pairs]
    ours = [pair[0] for pair in pairs]
    for process, (connection, theirs) in zip(processes, pairs):  # one after the other, so that kernels are compiled once
        process.start()
        theirs.close()  # so that the end of the process ends our waiting for it
        connection.recv()
    found: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(rounds):
        for name, asked in (("alone", ours[:1]), ("together", ours)):
            for connection in asked:
                connection.send(seconds)
            found[name].append(float(np.mean([np.median(connection.recv()) for connection in asked])))
    for process, connection in zip(processes, ours):
        connection.send(None)
        process.join()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = option_parser("two_processes", "A training step beside another process that trains, against alone.").parse_args(arguments)
    model, batch = (TINY_MODEL, TINY_BATCH) if options.tiny else (MODEL, BATCH)
    found = machine()
    print(machine_line(found))
    results, rows = [], []
    for threads in sorted({1, run.most_threads()}):
        times = measure(threads, model, batch, *((0.0, 1) if options.tiny else (SECONDS, ROUNDS)))
        slower = Summary.of([together / alone for alone, together in zip(times["alone"], times["together"])])
        results.append({"threads": threads, "model": model, "batch": batch, **times, "times_as_slow": slower.median})
        rows.append([str(threads), *(milliseconds(float(np.median(times[name]))) for name in times), f"{slower.median:.2f}"])
    print(table({"threads each": ">", "alone, ms": ">", "together, ms": ">", "times as slow": ">"}, rows))
    write_result(options, "two_processes", found, results=results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
