"""python -m benchmarks.cpu: training steps and inference of whole models, minivit in each precision beside the fastest of its rivals.

A training step is forward, cross-entropy, backward and AdamW on one batch, through `Trainer.step` and its plan; inference is `Predictor`,
at a usual batch and at batch 1. `sides.py` lists the rivals and their modes: PyTorch, and for inference ONNX Runtime and OpenVINO.
Each side has a process of its own with the same number of threads. For each model and workload:

    check    the same weights and batch in all: two training steps must give the same losses and weights, inference the same logits, as
             far as each side's precision allows (`answers.py`)
    trial    every mode of every rival runs briefly; the best in float32, the two best of all, and the two best in int8, which is compared
             with int8 alone, go on
    rounds   these and minivit in turns; a turn is one step that is not counted, and as many as fit into --seconds

Reported: the median time of a step and the range of the middle half of all; the medians over the rounds of the rivals' times over
minivit's (for the other precisions, minivit's float32 too), and their geometric means; the peak of resident memory, and how much of it
came after the imports (the libraries of `runtimes.py` are imported after that). And what fraction of minivit's time is explained by each of
two floors: the operations that the ops count (`Op.cost`; the optimizer's are not) at the fastest products of 2048 x 2048 matrices that any
side reached in this run in that precision or a more exact one; and the least bytes that the ops must move (`Op.least_bytes`) at the rate of
a triad over arrays that fit no cache, which is above 100 % where arrays stay in one.

With --growth, instead: how minivit's time and memory grow with the batch and with the number of tokens (`growth.py`).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from tqdm import tqdm

from minivit import UserError

from .answers import Answers, Disagreement, checked, make_problem, product_problem, reference_answers
from .growth import growth
from .measure import Summary, machine, machine_line, option_parser, write_result
from .report import draw, geometric_means, rates_line, rows, show
from .sides import EXACTNESS, OURS, REFERENCE, Side, best_rates, fits, products_of_rivals, rivals, trains, unavailable
from .turns import Measured, Task, alternate, steps_for, trial
from .worker import Problem, Worker

MODELS = {
    "vit_nano_patch2_8": 64,
    "vit_tiny_patch4_32": 64,
    "mixer_tiny_patch4_32": 64,
    "vit_tiny_patch16_224": 16,
    "mixer_s16_224": 16,
}  # with the images in a batch
USUAL_BATCH, TINY_BATCH = 64, 4
WORKLOADS = ("train", "infer")
TINY_MODELS = ("vit_nano_patch2_8",)


class Job(NamedTuple):
    """What is measured: one entry of the result."""

    model: str
    problem: Problem
    workload: str  # "train" or "infer"


# ------------------------------------------------------------------------------------------------------------------------ limits
@dataclass(frozen=True)
class Limits:
    products: dict[str, float]  # floating-point operations a second of large products, by side
    memory: float  # bytes a second

    @classmethod
    def of(cls, ours: Sequence[Side], options: Namespace) -> Limits:
        problem = product_problem(options.tiny)
        reference, works = reference_answers(problem, "infer", (REFERENCE.precision,), options.threads)
        flops, _ = works[REFERENCE.precision]
        others = [side for side in products_of_rivals() if not unavailable(side, options.tiny)]
        products = {}
        for side in dict.fromkeys([REFERENCE, *ours, *others]):
            with checked(problem, side, "infer", reference, options.threads) as worker:
                steps = steps_for(worker, "infer", options.seconds, options.steps)
                products[side.name] = flops / min(worker.call("turn", "infer", steps))
        with Worker(REFERENCE, problem, options.threads) as worker:
            return cls(products, worker.call("memory_rate", options.tiny))

    def fractions(self, work: tuple[int, int], precision: str, seconds: float) -> dict[str, float]:
        """What of a time the arithmetic takes at the least, and the memory traffic."""
        flops, moved = work
        return {
            "flops": flops,
            "least_bytes": moved,
            "of_arithmetic": flops / best_rates(self.products)[precision] / seconds,
            "of_memory": moved / self.memory / seconds,
        }


# -------------------------------------------------------------------------------------------------------------------------- time
def try_rivals(
    problem: Problem, workload: str, sides: Sequence[Side], reference: Answers, options: Namespace, progress: tqdm
) -> tuple[dict[str, float], dict[str, str]]:
    """By name: the seconds of a step of each rival, roughly; and why there are none of the others.

    Raises Disagreement for a rival in float32: then minivit may be the one that errs.
    """
    seconds, failures = {}, {}
    for side in sides:
        progress.set_postfix_str(side.name)
        try:
            with checked(problem, side, workload, reference, options.threads) as worker:
                seconds[side.name] = trial(worker, workload, options)
        except Disagreement as error:
            if side.precision == REFERENCE.precision:
                raise
            failures[side.name] = str(error)
        except RuntimeError as error:  # whatever went wrong in its process
            failures[side.name] = str(error).strip().splitlines()[-1]
        progress.update()
    return seconds, failures


def measure(job: Job, ours: Sequence[Side], others: Sequence[Side], limits: Limits, options: Namespace, progress: tqdm) -> dict[str, Any]:
    """An entry of the result: checks all, tries the rivals, and times the best of them in turns with minivit."""
    model, problem, workload = job
    reference, works = reference_answers(problem, workload, [side.precision for side in ours], options.threads)
    for side in ours:
        if side != REFERENCE:
            with checked(problem, side, workload, reference, options.threads):
                pass
    trials, failures = try_rivals(problem, workload, others, reference, options, progress)
    promising = promising_rivals([side for side in others if side.name in trials], trials)
    chosen = {side.name: side for side in [*ours, *others] if side in ours or any(side.name in names for names in promising.values())}
    progress.set_postfix_str("")
    measured = alternate({name: Task(side, problem, workload) for name, side in chosen.items()}, options, progress.update)
    best = {kind: min(names, key=lambda name: median(measured[name].medians)) for kind, names in promising.items() if names}
    sides = {name: {"precision": chosen[name].precision, **found.entry(problem.batch)} for name, found in measured.items()}
    for side in ours:
        sides[side.name] |= limits.fractions(works[side.precision], side.precision, sides[side.name]["seconds"])
    return {
        "model": model,
        "workload": workload,
        "batch": problem.batch,
        "trials": trials,
        "failures": failures,
        "rivals": best,
        "sides": sides,
        "times_as_fast": {
            side.precision: {
                kind: asdict(ratio(measured[side.name], measured[name]))
                for kind, name in {**best, "ours": REFERENCE.name}.items()
                if name in measured and name != side.name and (kind != "int8" or side.precision == "int8")
            }
            for side in ours
        },
    }


def promising_rivals(sides: Sequence[Side], trials: Mapping[str, float]) -> dict[str, list[str]]:
    """By kind of rival, the fastest of the trials, which are short: the second may be the first."""
    fastest = sorted(sides, key=lambda side: trials[side.name])
    exact, rounded = ([side.name for side in fastest if side.precision == precision] for precision in ("float32", "int8"))
    best = [side.name for side in fastest if side.name not in rounded][:2] + exact[:1]
    return {"float32": [name for name in exact if name in best], "any": best, "int8": rounded[:2]}


def ratio(ours: Measured, theirs: Measured) -> Summary:
    """How many times as fast as theirs, over the rounds."""
    return Summary.of([b / a for a, b in zip(ours.medians, theirs.medians)])


def jobs(options: Namespace) -> Iterator[Job]:
    for name in options.models:
        problem = make_problem(name, options.batch or (TINY_BATCH if options.tiny else MODELS.get(name, USUAL_BATCH)))
        if "train" in options.workloads:
            yield Job(name, problem, "train")
        for batch in dict.fromkeys((problem.batch, 1)) if "infer" in options.workloads else ():
            yield Job(name, replace(problem, batch=batch), "infer")


def entries_of(options: Namespace, ours: Sequence[Side], others: Mapping[str, Sequence[Side]], limits: Limits) -> Iterator[dict[str, Any]]:
    """An entry for each model, workload and batch, as it is measured."""
    whole = "int8" not in options.precisions  # then nobody is timed in it
    found = []
    for job in jobs(options):
        able = [side for side in ours if job.workload == "infer" or trains(side)]
        rivals = [side for side in others[job.workload] if fits(side, job.problem.batch, options.threads)]
        found.append((job, able, [side for side in rivals if not (whole and side.precision == "int8")]))
    with tqdm(total=sum(len(sides) + options.rounds for *_, sides in found), disable=None, leave=False, unit="turn") as progress:
        for job, able, sides in found:
            if able:
                progress.set_description(f"{job.model} {job.workload} {job.problem.batch}")
                yield measure(job, able, sides, limits, options, progress)


# -------------------------------------------------------------------------------------------------------------------------- main
def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = option_parser("cpu", "Training steps and inference, minivit in each precision beside the fastest of its rivals.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"presets (default: {' '.join(MODELS)})")
    parser.add_argument(
        "--precisions", nargs="+", choices=EXACTNESS, default=EXACTNESS, metavar="NAME", help=f"minivit's (default: {' '.join(EXACTNESS)})"
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="NAME", help=f"(default: {' '.join(WORKLOADS)})"
    )
    parser.add_argument("--batch", type=int, help=f"images in a batch (default: {USUAL_BATCH}, of 224-pixel models 16)")
    parser.add_argument("--threads", type=int, help="of each side (default: as many as there are cores)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a turn takes (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="instead, how minivit's time and memory grow with batch and tokens")
    options = parser.parse_args(arguments)
    options.steps, options.trial_seconds = 2, 0.5  # the least in a turn; of a rival's trial
    if options.tiny:
        options.rounds, options.seconds, options.steps, options.trial_seconds = 2, 0.0, 1, 0.0
    options.models = options.models or (TINY_MODELS if options.tiny else MODELS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    ours = [Side(OURS, precision) for precision in options.precisions]
    found = machine()
    found["threads"] = options.threads = options.threads or found["cores"]
    print(machine_line(found))
    try:
        if options.growth:
            return growth(ours, options, found)
        for name in options.models:
            make_problem(name, 1)
    except UserError as error:
        print(error)
        return 2
    others, reasons = rivals(options.tiny)
    for reason in dict.fromkeys(reasons.values()):
        print(f"not timed: {', '.join(name for name, why in reasons.items() if why == reason)}: {reason}")
    limits = Limits.of(ours, options)
    print(rates_line(limits.products, limits.memory))
    entries: list[dict[str, Any]] = []
    for entry in entries_of(options, ours, others, limits):
        entries.append(entry)
        for row in rows([entry]):
            print(*row, sep="  ", file=sys.stderr, flush=True)
        paths = write_result(
            options,
            "cpu",
            found,
            tell=False,
            product_rates=limits.products,
            memory_rate=limits.memory,
            rounds=options.rounds,
            seconds_a_turn=options.seconds,
            not_timed=reasons,
            results=entries,
            geometric_means=geometric_means(entries),
        )
    show(entries)
    for path in paths:
        print(f"wrote {path}")
        draw(entries, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
