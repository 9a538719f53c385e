"""What `benchmarks.cpu` tells of its entries: tables, geometric means, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

from minivit.plots.figure import BLUE, RED, new_figure, save_figure

from .measure import milliseconds, percent, table
from .sides import EXACTNESS

Entry = Mapping[str, Any]
KINDS = {"float32": "best float32 rival", "any": "best rival", "int8": "best int8 rival", "ours": "minivit's float32"}
COLOURS = (BLUE, "#ccbb44", RED, "#228833")
COLUMNS = {
    "model": "<",
    "": "<",
    "batch": ">",
    "by": "<",
    "ms": ">",
    "spread": ">",
    "images/s": ">",
    "of arithmetic": ">",
    "of memory": ">",
    "peak MB": ">",
    "after imports": ">",
    "x float32": ">",
    "x best": ">",
    "x int8": ">",
    "x ours": ">",
}


def workload_of(entry: Entry) -> str:
    return entry["workload"] + " at batch 1" * (entry["workload"] == "infer" and entry["batch"] == 1)


def ratios(entries: Sequence[Entry], workload: str, precision: str, kind: str) -> dict[str, float]:
    """By model, how many times as fast as the best rival of a kind minivit is."""
    found = {e["model"]: e["times_as_fast"].get(precision, {}).get(kind) for e in entries if workload_of(e) == workload}
    return {model: ratio["median"] for model, ratio in found.items() if ratio}


def geometric_means(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """By workload, precision and kind of rival: the geometric mean over the models of how many times as fast, and the least."""
    means = []
    for workload in dict.fromkeys(map(workload_of, entries)):
        for precision in EXACTNESS:
            for kind in KINDS:
                found = ratios(entries, workload, precision, kind)
                if found:
                    means.append(
                        {
                            "workload": workload,
                            "precision": precision,
                            "rival": kind,
                            "models": len(found),
                            "times_as_fast": geometric_mean(found.values()),
                            "least": min(found.values()),
                        }
                    )
    return means


# ------------------------------------------------------------------------------------------------------------------------ tables
def rates_line(rates: Mapping[str, float], memory: float) -> str:
    return f"products, GFLOP/s: {', '.join(f'{name} {rate / 1e9:.0f}' for name, rate in rates.items())}; memory {memory / 1e9:.1f} GB/s"


def rows(entries: Sequence[Entry]) -> Iterator[list[str]]:
    for entry in entries:
        for name, found in entry["sides"].items():
            mine = entry["times_as_fast"].get(found["precision"], {}) if name.startswith("minivit ") else {}
            floors = [percent(found[key]) if key in found else "" for key in ("of_arithmetic", "of_memory")]
            yield [
                entry["model"],
                entry["workload"],
                str(entry["batch"]),
                name,
                milliseconds(found["seconds"]),
                percent(found["spread"]),
                f"{found['images_per_second']:.0f}",
                *floors,
                f"{found['peak_memory'] / 1e6:.0f}",
                f"{found['memory_after_imports'] / 1e6:.0f}",
                *(f"{mine[kind]['median']:.2f}" if kind in mine else "" for kind in KINDS),
            ]


def show(entries: Sequence[Entry]) -> None:
    """Print what the rivals' trials took, the table, and the geometric means."""
    for entry in entries:
        where = f"{entry['model']}, {entry['workload']}, batch {entry['batch']}"
        if entry["trials"]:
            print(f"{where}: ms in a trial: {', '.join(f'{n} {milliseconds(t)}' for n, t in entry['trials'].items())}")
        for name, reason in entry["failures"].items():
            print(f"{where}: {name}: not timed: {reason}")
    print(table(COLUMNS, [*rows(entries)]))
    means = geometric_means(entries)
    if means:
        columns = {"times as fast": "<", "precision": "<", "than the": "<", "geometric mean": ">", "least": ">", "models": ">"}
        print(
            "\n"
            + table(
                columns,
                [
                    [m["workload"], m["precision"], KINDS[m["rival"]], f"{m['times_as_fast']:.2f}", f"{m['least']:.2f}", str(m["models"])]
                    for m in means
                ],
            )
        )


# ----------------------------------------------------------------------------------------------------------------------- picture
def draw(entries: Sequence[Entry], path: Path) -> None:
    """Bars of the ratios by model and precision, a row a workload and a column a kind of rival."""
    found = {
        (w, kind): by_precision
        for w in dict.fromkeys(map(workload_of, entries))
        for kind in KINDS
        if kind != "ours" and any((by_precision := {p: ratios(entries, w, p, kind) for p in EXACTNESS}).values())
    }
    if not found:
        return  # there were no rivals
    workloads, kinds = (list(dict.fromkeys(names)) for names in zip(*found))
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    figure = new_figure(5 + 1.6 * len(models), 0.6 + 2.2 * len(workloads))
    axes = figure.subplots(len(workloads), len(kinds), squeeze=False, sharex=True)
    colours = {p: colour for p, colour in zip(EXACTNESS, COLOURS) if any(p in entry["times_as_fast"] for entry in entries)}
    width = 0.8 / len(colours)
    for row, workload in zip(axes, workloads):
        for axis, kind in zip(row, kinds):
            for i, (precision, colour) in enumerate(colours.items()):
                bar = found.get((workload, kind), {}).get(precision, {})
                places = np.arange(len(models)) + (i - (len(colours) - 1) / 2) * width
                bars = axis.bar(places, [bar.get(m, 0) for m in models], width, color=colour, label=precision)
                axis.bar_label(bars, [f"{bar[m]:.2g}" if m in bar else "" for m in models], fontsize=7)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_title(f"{workload}, against the {KINDS[kind]}", fontsize=8)
            axis.set(ylabel="times as fast")
            axis.margins(y=0.12)  # room for the numbers
            axis.set_xticks(range(len(models)), [m.replace("_patch", "\npatch") for m in models], fontsize=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours), frameon=False, fontsize=8)
    save_figure(figure, path)
    print(f"wrote {path}")
