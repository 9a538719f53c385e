"""`minivit info`: a description of the machine, or the parameters and multiply-adds of a model."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..files import user_path
from ..inference.classifier import load
from ..models import FAMILIES, PRESETS, create_model
from ..nn.cost import ModelCost
from ..runtime.machine import describe_machine
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model's name, or a run: its parameters and multiply-adds instead")
    parser.add_argument("--layers", action="store_true", help="the multiply-adds of each layer of MODEL too")


def run(options: argparse.Namespace) -> int:
    if options.layers and options.model is None:
        raise UserError("--layers tells of a model: minivit info MODEL --layers")
    info = describe_machine() if options.model is None else describe_model(options.model)
    if options.json:
        print_json(info)
    else:
        print(machine_text(info) if options.model is None else model_text(info, options.layers))
    return 0


def machine_text(info: dict[str, Any]) -> str:
    """`describe_machine()` as aligned lines."""
    rows = {
        "minivit": info["minivit"],
        "Python": f"{info['python']}, {info['system']}",
        "CPU": f"{info['cpu']}, {info['cores']} cores",
        "instructions": " ".join(info["instructions"]) or "none of those that kernels use",
        "threads": f"{info['threads']}, or 1 ... {info['most_threads']} by --threads",
        "precision": "auto is {}: {}".format(*info["precision"]),
        "BLAS of NumPy": info["blas"],
        "GPU": info["gpu"] or f"none: {info['gpu_note']}",
        "cache": info["cache"],
        "versions": ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    }
    return _aligned(rows)


def describe_model(name: str) -> dict[str, Any]:
    """A model by name as a dict of JSON values: its input, its parameters, and its multiply-adds for one image (`nn/cost.py`).

    name: a preset or family of `create_model`, or a run as for `load`. Raises UserError if there is neither.
    """
    if name in PRESETS or name in FAMILIES:
        field_names = {field.name for field in fields((FAMILIES.get(name) or PRESETS[name]).Config)}
        options: dict[str, Any] = {"init": "zeros"} if "init" in field_names else {}  # fast even for the largest model
        model = create_model(name, **options)
    elif user_path(name).exists() or Path("runs", name).exists():
        model = load(name).model
    else:
        raise UserError(f"{name} is no model{nearest(name, [*PRESETS, *FAMILIES])} and no run: list_models() names the models")
    parameters = model.distinct_parameters()
    config, cost = model.config, model.cost()
    return {
        "model": model.name,
        "family": model.family,
        "input": [*config.image_shape],
        "classes": config.num_classes,
        "dtype": config.dtype,
        "parameters": sum(p.size for p in parameters),
        "trainable": sum(p.size for p in parameters if p.requires_grad),
        "macs": cost.total,
        "exits": list(cost.exits),
        "layers": dict(cost.layers),
        "activations": cost.activations,
        "calibration": json.loads(model.metadata().get("calibration", "null")),
    }


def model_text(info: dict[str, Any], layers: bool = False) -> str:
    """`describe_model()` as aligned lines; with `layers`, followed by the table by layer."""
    total, frozen = info["macs"], info["parameters"] - info["trainable"]
    rows = {
        "model": info["model"] + (f" ({info['family']})" if info["family"] != info["model"] else ""),
        "input": f"({', '.join(map(str, info['input']))}), {info['dtype']}",
        "classes": str(info["classes"]),
        "parameters": f"{info['parameters']:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
        "multiply-adds": f"{total:,} an image",
        "activations": f"{info['activations']:,} numbers an image",
    }
    if len(info["exits"]) > 1:
        rows |= {f"up to exit {k}": f"{macs:,} ({100 * macs / total:.1f} %)" for k, macs in enumerate(info["exits"], 1)}
    if info["calibration"]:
        calibration = info["calibration"]
        machine = f" ({calibration['measured']})" if calibration["measured"] else ""
        rows["budgets"] = f"{', '.join(f'{budget:.6g}' for budget in calibration['budgets'])}, unit {calibration['unit']}{machine}"
    table = f"\n\n{ModelCost(info['layers'], tuple(info['exits']), info['activations'])}" if layers else ""
    return _aligned(rows) + table


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
