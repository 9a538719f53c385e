"""python -m benchmarks.cpu: training steps and inference of whole models in float32, minivit beside PyTorch.

A training step is forward, cross-entropy, backward and AdamW on one batch, through `Trainer.step` and its plan; inference is `Predictor`.
PyTorch runs eagerly. Each side has a process of its own with the same number of threads, and they work in turns, the other one asleep:

    check    the same weights and batch in both: two training steps must give the same losses, weights and then logits
    rounds   minivit, PyTorch, minivit, PyTorch, ...; a turn is one step that is not counted, and as many as fit into --seconds

Reported: the median time of a step and the range of the middle half of all; the median over the rounds of PyTorch's time over minivit's;
the fraction of the arithmetic floor, which is the operations that the ops count (`Op.cost`; the optimizer's are not) at the fastest float32
product of 2048 x 2048 matrices that minivit, NumPy or PyTorch reached in this run; the peak of resident memory, and how much of it came
after the imports.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from statistics import median
from time import sleep
from typing import Any

import numpy as np
from tqdm import tqdm

from minivit import UserError, create_model

from .measure import Summary, machine, machine_line, milliseconds, option_parser, percent, table, write_result
from .worker import Problem, Worker

MODELS, BATCH = ("vit_nano_patch2_8", "vit_tiny_patch4_32", "mixer_tiny_patch4_32"), 64
TINY_MODELS, TINY_BATCH = ("vit_nano_patch2_8", "mixer_nano_patch2_8"), 4
SIDES = {"minivit": "ours", "PyTorch": "rivals"}        # name -> module in this package
WORKLOADS = ("train", "infer")
PAUSE = 0.1                                             # seconds before a turn: the other side's threads have stopped spinning
MOST_STEPS = 200                                        # in a turn
ADAMW = {"lr": 1e-4, "weight_decay": 0.05, "eps": 1e-8}
# For the check, a weight decay that shows, and an eps that keeps the update smooth: with the usual one, where a gradient is zero but for
# rounding (the bias of k, or of the last layer of a token-mixing MLP), AdamW makes a whole step of the rounding error.
CHECKED_ADAMW = {"lr": 1e-3, "weight_decay": 1.0, "eps": 1e-5}
LOSS_TOLERANCE = 1e-5                                   # relative
LOGIT_TOLERANCE = 1e-3                                  # relative to the largest
WEIGHT_TOLERANCE = 1e-2                                 # relative to the largest change of any weight in two steps, a few lr


class Disagreement(RuntimeError):
    """The two sides do not compute the same."""


# ----------------------------------------------------------------------------------------------------------------------- problem
def make_problem(name: str, batch: int) -> Problem:
    """A preset with random weights about those it begins with, so that no gradient is zero because a head is."""
    model = create_model(name)
    rng = np.random.default_rng(0)
    weights = {n: (w + 0.02 * rng.standard_normal(w.shape)).astype(np.float32) for n, w in model.state_dict().items()}
    return Problem(model.family, asdict(model.config), weights, batch, ADAMW)


@contextmanager
def workers_for(problem: Problem, sides: Mapping[str, str], threads: int) -> Iterator[dict[str, Worker]]:
    """A fresh process for each side."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Worker(module, problem, threads)) for name, module in sides.items()}


# ------------------------------------------------------------------------------------------------------------------------- check
@dataclass(frozen=True)
class Answers:
    losses: list[float]                                 # of two steps
    weights: dict[str, np.ndarray]                      # after them
    logits: np.ndarray                                  # (B, K), with these weights

    @classmethod
    def of(cls, worker: Worker) -> Answers:
        losses = [worker.call("train") for _ in range(2)]
        return cls(losses, worker.call("weights"), worker.call("infer"))


def compare(before: Mapping[str, np.ndarray], ours: Answers, theirs: Answers) -> None:
    """Raises Disagreement that lists what differs by more than float32 explains. before: the weights that both began with."""
    wrong = [f"loss {a:.7g} and {b:.7g}" for a, b in zip(ours.losses, theirs.losses) if not abs(a - b) <= LOSS_TOLERANCE * abs(b)]
    change = max(float(np.abs(theirs.weights[name] - start).max()) for name, start in before.items())
    for name in before:
        error = np.abs(ours.weights[name] - theirs.weights[name]).max() / change
        if not error <= WEIGHT_TOLERANCE:
            wrong.append(f"{name} differs by {percent(error)} of what two steps change at most")
    error = np.abs(ours.logits - theirs.logits).max() / np.abs(theirs.logits).max()
    if not error <= LOGIT_TOLERANCE:
        wrong.append(f"logits differ by {percent(error)} of the largest")
    if wrong:
        raise Disagreement(f"minivit and its rival do not compute the same: {'; '.join(wrong)}")


def check(problem: Problem, sides: Mapping[str, str], threads: int) -> dict[str, int]:
    """Hold the rival's answers against minivit's; gives the floating-point operations of each workload. Raises Disagreement."""
    with workers_for(replace(problem, adamw=CHECKED_ADAMW), sides, threads) as workers:
        flops = workers["minivit"].call("flops")
        answers = {name: Answers.of(worker) for name, worker in workers.items()}
    for name in sides.keys() - {"minivit"}:
        compare(problem.weights, answers["minivit"], answers[name])
    return dict(zip(WORKLOADS, flops))


def measure_peak(problem: Problem, sides: Mapping[str, str], threads: int, tiny: bool) -> dict[str, float]:
    """Floating-point operations a second of a large product, by library; one process after the other."""
    rates: dict[str, float] = {}
    for module in sides.values():
        with Worker(module, problem, threads) as worker:
            rates |= worker.call("product_rates", tiny)
    return rates


# -------------------------------------------------------------------------------------------------------------------------- time
def alternate(problem: Problem, workload: str, sides: Mapping[str, str], options: Namespace, progress: tqdm) -> dict[str, dict[str, Any]]:
    """By side: the times of all rounds in seconds, and its memory in bytes."""
    with workers_for(problem, sides, options.threads) as workers:
        steps = {}
        for name, worker in workers.items():            # a warm-up: its times only tell how long a step is
            usual = median(worker.call("turn", workload, 3))
            steps[name] = max(options.steps, min(MOST_STEPS, round(options.seconds / usual)))
        rounds: dict[str, list[list[float]]] = {name: [] for name in workers}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                sleep(PAUSE)
                rounds[name].append(worker.call("turn", workload, steps[name]))
            progress.update()
        return {name: {"rounds": rounds[name], "memory": worker.call("memory")} for name, worker in workers.items()}


def summarise(name: str, batch: int, workload: str, flops: int, peak: float, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One entry of the result; times in seconds, memory in bytes."""
    sides = {}
    for side, found in measured.items():
        times = Summary.of([t for turn in found["rounds"] for t in turn])
        start, most = found["memory"]
        sides[side] = {"seconds": times.median, "spread": times.spread, "images_per_second": batch / times.median,
                       "of_floor": flops / peak / times.median, "peak_memory": most, "memory_after_imports": most - start,
                       "round_medians": [median(turn) for turn in found["rounds"]]}
    entry = {"model": name, "workload": workload, "batch": batch, "flops": flops, "floor_seconds": flops / peak, "sides": sides}
    if "PyTorch" in sides:
        ratios = [b / a for a, b in zip(sides["minivit"]["round_medians"], sides["PyTorch"]["round_medians"])]
        entry["times_as_fast"] = asdict(Summary.of(ratios))
    return entry


# ------------------------------------------------------------------------------------------------------------------------ output
COLUMNS = {"model": "<", "": "<", "batch": ">", "by": "<", "ms": ">", "spread": ">", "images/s": ">", "of floor": ">", "peak MB": ">",
           "after imports": ">", "times as fast": ">"}


def rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = []
    for entry in entries:
        for side, found in entry["sides"].items():
            ratio = f"{entry['times_as_fast']['median']:.2f}" if side == "minivit" and "times_as_fast" in entry else ""
            lines.append([entry["model"], entry["workload"], str(entry["batch"]), side,
                          milliseconds(found["seconds"]), percent(found["spread"]),
                          f"{found['images_per_second']:.0f}", percent(found["of_floor"]),
                          f"{found['peak_memory'] / 1e6:.0f}", f"{found['memory_after_imports'] / 1e6:.0f}", ratio])
    return lines


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = option_parser("cpu", "Training steps and inference in float32, minivit beside PyTorch.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"presets (default: {' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, help=f"images in a batch (default: {BATCH})")
    parser.add_argument("--threads", type=int, help="of each side (default: as many as there are cores)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a turn takes (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.steps = 3                                   # the least in a turn
    if options.tiny:
        options.rounds, options.seconds, options.steps = 2, 0.0, 1
    options.models = options.models or (TINY_MODELS if options.tiny else MODELS)
    options.batch = options.batch or (TINY_BATCH if options.tiny else BATCH)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    sides = {name: module for name, module in SIDES.items() if name != "PyTorch" or find_spec("torch")}
    found = machine()
    found["threads"] = options.threads = options.threads or found["cores"]
    print(machine_line(found))
    if "PyTorch" not in sides:
        print("PyTorch is not installed (pip install torch): minivit is timed alone, and its answers are held against nothing")
    try:
        problems = {name: make_problem(name, options.batch) for name in options.models}
    except UserError as error:
        print(error)
        return 2
    rates = measure_peak(next(iter(problems.values())), sides, options.threads, options.tiny)
    peak = max(rates.values())
    print("float32 products, GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()))
    entries = []
    with tqdm(total=len(problems) * len(WORKLOADS) * options.rounds, disable=None, leave=False, unit="round") as progress:
        for name, problem in problems.items():
            progress.set_description(name)
            flops = check(problem, sides, options.threads)
            for workload in WORKLOADS:
                measured = alternate(problem, workload, sides, options, progress)
                entries.append(summarise(name, problem.batch, workload, flops[workload], peak, measured))
    print(table(COLUMNS, rows(entries)))
    write_result(options, "cpu", found, product_rates=rates, rounds=options.rounds, seconds_a_turn=options.seconds, results=entries)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
