"""`minivit gradcheck`: check gradients and accuracy of the kernels on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from math import isfinite

import numpy as np

from ..models import create_model, list_models
from ..models.registry import PRESETS
from ..nn.module import Module
from ..progress import say
from ..testing.checks import Report, check
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="OP|MODEL", nargs="*", help="what to check (default: every op, and a small model of each family)")


def run(options: argparse.Namespace) -> int:
    smallest = {PRESETS[name].family: name for name in list_models("*_nano_*8")}  # the smallest model of each family
    models = {name: _model_to_check(name) for name in (list_models() if options.names else smallest.values())}
    names = [smallest.get(name, name) for name in options.names]
    reports: list[Report] = []
    header = f"{'':6} {'name':<24} {'backend':<9} {'dtype':<8} {'against':<11} {'directions':>10} {'elements':>9}  worst relative error"
    for report in check(names, models):
        if not options.json:
            if not reports:
                print(header)
            status = "ok" if report.passed else "FAILED"
            print(
                f"{status:<6} {report.name:<24} {report.backend:<9} {report.dtype:<8} {report.against:<11} {report.directions:>10} "
                f"{report.elements:>9}  {report.worst:.1e}",
                flush=True,
            )
        reports.append(report)
    failures = [report.failure for report in reports if not report.passed]
    if options.json:
        print_json(
            [{**asdict(report), "worst": report.worst if isfinite(report.worst) else None, "passed": report.passed} for report in reports]
        )
    for failure in failures:
        say(f"minivit: {failure}")
    return 1 if failures else 0


def _model_to_check(name: str) -> Callable[[], tuple[Module, np.ndarray]]:
    def make() -> tuple[Module, np.ndarray]:
        model = create_model(name, dtype="float64")
        config = model.config
        images = np.random.default_rng(0).standard_normal((2, *config.image_shape))
        return model.eval(), images

    return make
