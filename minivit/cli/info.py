"""`minivit info`: what minivit sees of this machine; of a model, its parameters and multiply-adds."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
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
    found = describe_machine() if options.model is None else describe_model(options.model)
    if options.json:
        print_json(found)
    else:
        print(machine_text(found) if options.model is None else model_text(found, options.layers))
    return 0


def machine_text(found: dict[str, Any]) -> str:
    """`describe_machine()` as aligned lines."""
    rows = {
        "minivit": found["minivit"],
        "Python": f"{found['python']}, {found['system']}",
        "CPU": f"{found['cpu']}, {found['cores']} cores",
        "instructions": " ".join(found["instructions"]) or "none of those that kernels use",
        "threads": f"{found['threads']}, or 1 ... {found['most_threads']} by --threads; threading layer {found['threading_layer']}",
        "precision": "auto is {}: {}".format(*found["precision"]),
        "BLAS of NumPy": found["blas"],
        "GPU": found["gpu"] or f"none: {found['gpu_note']}",
        "cache": found["cache"],
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    return _aligned(rows)


def describe_model(name: str) -> dict[str, Any]:
    """A model by name, ready for JSON: its input, its parameters, and its multiply-adds for one image (`minivit.cost`).

    name: a preset or family of `create_model`, or a run as `load` takes it. Raises UserError where there is neither.
    """
    if name in PRESETS or name in FAMILIES:
        known = {field.name for field in fields((FAMILIES.get(name) or PRESETS[name]).Config)}
        options: dict[str, Any] = {"init": "zeros"} if "init" in known else {}  # so that the largest takes no time either
        model = create_model(name, **options)
    elif Path(name).expanduser().exists() or Path("runs", name).exists():
        model = load(name).model
    else:
        raise UserError(f"{name} is no model{nearest(name, [*PRESETS, *FAMILIES])} and no run: list_models() names the models")
    parameters = {id(p): p for p in model.parameters()}.values()  # a shared one once
    config, cost = model.config, model.cost()
    return {
        "model": model.name,
        "family": model.family,
        "input": [config.in_channels, config.image_size, config.image_size],
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


def model_text(found: dict[str, Any], layers: bool = False) -> str:
    """`describe_model()` as aligned lines; with `layers`, the table by layer below."""
    total, frozen = found["macs"], found["parameters"] - found["trainable"]
    rows = {
        "model": found["model"] + (f" ({found['family']})" if found["family"] != found["model"] else ""),
        "input": f"({', '.join(map(str, found['input']))}), {found['dtype']}",
        "classes": str(found["classes"]),
        "parameters": f"{found['parameters']:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
        "multiply-adds": f"{total:,} an image",
        "activations": f"{found['activations']:,} numbers an image",
    }
    if len(found["exits"]) > 1:
        rows |= {f"up to exit {k}": f"{macs:,} ({100 * macs / total:.1f} %)" for k, macs in enumerate(found["exits"], 1)}
    if found["calibration"]:
        kept = found["calibration"]
        where = f" ({kept['measured']})" if kept["measured"] else ""
        rows["budgets"] = f"{', '.join(f'{budget:.6g}' for budget in kept['budgets'])}, unit {kept['unit']}{where}"
    table = f"\n\n{ModelCost(found['layers'], tuple(found['exits']), found['activations'])}" if layers else ""
    return _aligned(rows) + table


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
