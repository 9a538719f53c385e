"""How minivit's time and memory grow: with the batch, and with the number of tokens.

    batch     `vit_tiny_patch4_32`: the time of an image relative to that at batch 64, which should stay the same; and peak memory after
              imports relative to the straight line through the smallest batch and that of 64, below which both training and prediction
              stay, as they compute large batches in parts
    tokens    the same model on larger images at the same patch size, so that tokens double twice: the time relative to that of half as
              many tokens, and the operations likewise, whose ratio is above two by attention's share alone

All configurations of a table take turns, as sides do.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from tqdm import tqdm

from .answers import make_problem
from .measure import milliseconds, table, write_result
from .sides import REFERENCE, Side, trains
from .turns import Measured, Task, alternate
from .worker import Problem, Worker

MODEL, TINY_MODEL = "vit_tiny_patch4_32", "vit_nano_patch2_8"
BATCHES, TINY_BATCHES, REFERENCE_BATCH, TINY_REFERENCE = (8, 32, 64, 128, 512), (1, 2, 4), 64, 2
SIZES, TINY_SIZES, TOKENS_BATCH, TINY_TOKENS_BATCH = (28, 40, 56), (8, 12), 32, 2  # pixels: 49, 100 and 196 patches
BAR = 0.15  # by which a ratio may miss what is expected


def verdict(ratio: float) -> str:
    return "kept" if ratio <= 1 + BAR else "EXCEEDED"


def by_batch(measured: Mapping[int, Measured], reference: int) -> Iterator[dict[str, Any]]:
    """An entry a batch. Times are compared round by round."""
    memory = {batch: found.memory[1] - found.memory[0] for batch, found in measured.items()}
    first = min(memory)
    slope = (memory[reference] - memory[first]) / (reference - first)
    for batch, found in measured.items():
        relative = median(a / batch / (b / reference) for a, b in zip(found.medians, measured[reference].medians))
        line = memory[first] + slope * (batch - first)
        yield {
            "batch": batch,
            **found.entry(batch),
            "time_an_image": relative,
            "memory_of_line": memory[batch] / line,
            "verdict": verdict(max(relative, memory[batch] / line)),
        }


def by_tokens(measured: Mapping[int, Measured], problems: Mapping[int, Problem], flops: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """An entry a doubling of the tokens."""
    for small, large in pairwise(measured):
        time = median(a / b for a, b in zip(measured[large].medians, measured[small].medians))
        tokens = {size: problems[size].weights["pos_embed"].shape[1] for size in (small, large)}
        yield {
            "image_size": large,
            "tokens": tokens[large],
            "from_tokens": tokens[small],
            **measured[large].entry(problems[large].batch),
            "time_ratio": time,
            "operations_ratio": flops[large] / flops[small],
            "verdict": verdict(time * flops[small] / flops[large]),
        }


def grow(side: Side, workload: str, options: Namespace, progress: tqdm) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(entries by batch, entries by tokens)."""
    model = TINY_MODEL if options.tiny else MODEL
    batches, reference = (TINY_BATCHES, TINY_REFERENCE) if options.tiny else (BATCHES, REFERENCE_BATCH)
    progress.set_description(f"{side.name} {workload} by batch")
    tasks = {str(batch): Task(side, make_problem(model, batch), workload) for batch in batches}
    measured = {int(name): found for name, found in alternate(tasks, options, progress.update).items()}
    progress.set_description(f"{side.name} {workload} by tokens")
    sizes, batch = (TINY_SIZES, TINY_TOKENS_BATCH) if options.tiny else (SIZES, TOKENS_BATCH)
    problems = {size: make_problem(model, batch, image_size=size) for size in sizes}
    flops = {}
    for size, problem in problems.items():
        with Worker(REFERENCE, problem, options.threads) as worker:
            flops[size] = worker.call("work", workload, side.precision)[0]
    larger = {
        int(name): found
        for name, found in alternate({str(size): Task(side, p, workload) for size, p in problems.items()}, options, progress.update).items()
    }
    return [*by_batch(measured, reference)], [*by_tokens(larger, problems, flops)]


def growth(ours: Sequence[Side], options: Namespace, found: Mapping[str, Any]) -> int:
    """Measure, print and write what the module's docstring says."""
    batches, tokens = [], []
    cases = [(side, workload) for side in ours for workload in options.workloads if workload == "infer" or trains(side)]
    with tqdm(total=2 * len(cases) * options.rounds, disable=None, leave=False, unit="round") as progress:
        for side, workload in cases:
            about = {"workload": workload, "precision": side.precision}
            by_batch_entries, by_token_entries = grow(side, workload, options, progress)
            batches += [about | entry for entry in by_batch_entries]
            tokens += [about | entry for entry in by_token_entries]
    print(
        table(
            {
                "": "<",
                "precision": "<",
                "batch": ">",
                "ms": ">",
                "an image": ">",
                "MB after imports": ">",
                "of a line": ">",
                "verdict": "<",
            },
            [
                [
                    e["workload"],
                    e["precision"],
                    str(e["batch"]),
                    milliseconds(e["seconds"]),
                    f"{e['time_an_image']:.2f}",
                    f"{e['memory_after_imports'] / 1e6:.0f}",
                    f"{e['memory_of_line']:.2f}",
                    e["verdict"],
                ]
                for e in batches
            ],
        )
    )
    print(
        "\n"
        + table(
            {"": "<", "precision": "<", "tokens": ">", "ms": ">", "of the time": ">", "of the operations": ">", "verdict": "<"},
            [
                [
                    e["workload"],
                    e["precision"],
                    f"{e['from_tokens']} -> {e['tokens']}",
                    milliseconds(e["seconds"]),
                    f"{e['time_ratio']:.2f}",
                    f"{e['operations_ratio']:.2f}",
                    e["verdict"],
                ]
                for e in tokens
            ],
        )
    )
    write_result(options, "cpu-growth", found, bar=BAR, rounds=options.rounds, batches=batches, tokens=tokens)
    return 0
