"""What the benchmarks share: statistics, the machine they ran on, tables, options, result files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from minivit.files import atomic_file
from minivit.runtime.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
RIVALS = ("torch", "onnxruntime", "openvino")  # packages


# -------------------------------------------------------------------------------------------------------------------------- time
@dataclass(frozen=True)
class Summary:
    """Of measured values: their median, and the range of the middle half of them relative to it."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        low, middle, high = np.percentile(values, (25, 50, 75))
        return cls(float(middle), float((high - low) / middle))


# ----------------------------------------------------------------------------------------------------------------------- machine
def machine() -> dict[str, Any]:
    """What a result must be read with: processor, threads, versions."""
    found = describe_machine()
    kept = {name: found[name] for name in ("cpu", "instructions", "cores", "threads", "blas", "system", "python")}
    rivals = {name: version for name in RIVALS if (version := _version(name))}
    return kept | {"versions": {"minivit": found["minivit"], **found["versions"], **rivals}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_line(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{n} {found['versions'][n]}" for n in ("minivit", "numpy", "numba", *RIVALS) if n in found["versions"])
    return f"{found['cpu']}, threads: {found['threads']}, {' '.join(found['instructions'])}\n{versions}, Python {found['python']}"


# ------------------------------------------------------------------------------------------------------------- options and output
def option_parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m benchmarks.{benchmark}", description=description)
    parser.add_argument("--tiny", action="store_true", help="sizes so small that only whether it works can be learnt")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result as JSON")
    parser.add_argument("--save", action="store_true", help=f"write it to {RESULTS.parent.name}/{RESULTS.name}, under the machine's name")
    return parser


def result_paths(options: argparse.Namespace, benchmark: str, found: Mapping[str, Any]) -> list[Path]:
    """Where the options ask for the result."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{benchmark} {found['cpu']} {found['threads']}".lower())
    return [options.json] * bool(options.json) + [RESULTS / f"{slug}.json"] * options.save


def write_result(options: argparse.Namespace, benchmark: str, found: Mapping[str, Any], tell: bool = True, **parts: Any) -> list[Path]:
    """Write {benchmark, machine, tiny, **parts} where the options ask for it, and say where."""
    text = json.dumps({"benchmark": benchmark, "machine": found, "tiny": options.tiny, **parts}, indent=1, ensure_ascii=False) + "\n"
    paths = result_paths(options, benchmark, found)
    for path in paths:
        with atomic_file(path) as file:
            file.write(text.encode())
        if tell:
            print(f"wrote {path}")
    return paths


def earlier_runs(options: argparse.Namespace, name: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that an interrupted benchmark of this name, with these settings, has left where this one will write."""
    for path in result_paths(options, name, found):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] == settings and content["tiny"] == options.tiny:
                return content["results"]
    return []


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines under headings. columns: heading -> "<" for text or ">" for numbers."""
    lines = [tuple(columns), *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = columns.values()
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)).rstrip() for line in lines)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.1f} %"


def milliseconds(seconds: float) -> str:
    """With three digits that count."""
    return f"{1e3 * seconds:.{max(0, 2 - floor(log10(1e3 * seconds)))}f}"
