"""Who is compared: minivit and its rivals, each in every mode that might be its fastest.

The first word of a mode is its precision, by which its answers are checked and its hardware limit is chosen.

    float32, bf16x3, bfloat16       minivit, as `precision=`; ONNX Runtime; OpenVINO's INFERENCE_PRECISION_HINT
    int8                            minivit, as `precision=`; the others with ONNX Runtime's dynamic quantisation (`runtimes.py`)
    float32                         PyTorch, eagerly
    bfloat16 autocast               PyTorch with float32 weights, products in bfloat16
    bfloat16 pure                   PyTorch with weights, activations and AdamW's state in bfloat16
    bfloat16 medium                 PyTorch with `set_float32_matmul_precision("medium")`; "high" changes nothing on a CPU
    ... compiled                    through torch.compile; for inference with its weights frozen in
    ... streams                     OpenVINO with a stream a thread, each with its part of the batch, in place of one for all threads
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from minivit.kernels.cpu.llvm import X86
from minivit.kernels.cpu.tiles import supported

OURS = "minivit"
EXACTNESS = ("float32", "bf16x3", "bfloat16", "int8")  # precisions, the most exact first
COMPILERS = ("g++", "clang++", "cl")
PYTORCH = (
    "float32",
    "float32 compiled",
    "bfloat16 autocast",
    "bfloat16 autocast compiled",
    "bfloat16 pure",
    "bfloat16 pure compiled",
    "bfloat16 medium",
)


@dataclass(frozen=True)
class Library:
    module: str  # of its Contender, in this package
    packages: tuple[str, ...]  # that it takes
    train: tuple[str, ...]  # modes
    infer: tuple[str, ...]


LIBRARIES = {
    OURS: Library("ours", (), EXACTNESS[:-1], EXACTNESS),
    "PyTorch": Library("rivals", ("torch",), PYTORCH, PYTORCH),
    "ONNX Runtime": Library("runtimes", ("onnxruntime", "onnx", "torch"), (), ("float32", "int8")),
    "OpenVINO": Library(
        "runtimes",
        ("openvino", "onnxruntime", "onnx", "torch"),
        (),
        ("float32", "float32 streams", "bfloat16", "bfloat16 streams", "int8", "int8 streams"),
    ),
}
PRODUCTS = {"PyTorch": ("float32", "bfloat16 pure"), "ONNX Runtime": ("float32",), "OpenVINO": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Side:
    """A library in one of its modes."""

    library: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.library} {self.mode}"

    @property
    def precision(self) -> str:
        return self.mode.split()[0]

    @property
    def words(self) -> list[str]:
        """What the mode says beyond its precision."""
        return self.mode.split()[1:]

    @property
    def module(self) -> str:
        return LIBRARIES[self.library].module


REFERENCE = Side(OURS, "float32")  # whose answers the others are held against


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; always true of one that is no x86, of which nothing is known here."""
    return not X86 or any(supported()[way] for way in ("amx", "avx512bf16"))


def trains(side: Side) -> bool:
    """Whether there is training in a mode."""
    return side.mode in LIBRARIES[side.library].train


def unavailable(side: Side, tiny: bool) -> str | None:
    """Why a side cannot be timed on this machine, if so."""
    missing = [name for name in LIBRARIES[side.library].packages if not find_spec(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    if side.library != OURS and side.precision == "bfloat16" and not multiplies_bfloat16():
        return "takes several times as long as float32 on a CPU without bfloat16"
    if "compiled" in side.words:
        if tiny:
            return "compiles too long for --tiny"
        if not any(map(shutil.which, (os.environ.get("CXX") or COMPILERS[0], *COMPILERS))):
            return "no C++ compiler"
    return None


def rivals(tiny: bool) -> tuple[dict[str, list[Side]], dict[str, str]]:
    """(the rivals that can be timed, by workload; why the others cannot, by name)."""
    found: dict[str, list[Side]] = {"train": [], "infer": []}
    reasons = {}
    for library, about in LIBRARIES.items():
        for workload, modes in (("train", about.train), ("infer", about.infer)):
            for side in (Side(library, mode) for mode in modes if library != OURS):
                reason = unavailable(side, tiny)
                if reason:
                    reasons[side.name] = reason
                else:
                    found[workload].append(side)
    return found, reasons


def products_of_rivals() -> list[Side]:
    """The modes whose products may be the fastest in their precision."""
    return [Side(library, mode) for library, modes in PRODUCTS.items() for mode in modes]


def fits(side: Side, batch: int, threads: int) -> bool:
    """Whether a mode makes sense for a batch: streams want parts of equal size."""
    return "streams" not in side.words or (threads > 1 and batch % threads == 0)


def best_rates(rates: Mapping[str, float]) -> dict[str, float]:
    """By precision, the fastest product at least as exact, of the rates by side's name.

    bf16x3 is three products in bfloat16, so a third of that rate counts for it too.
    """
    measured = {precision: [rate for name, rate in rates.items() if precision in name.split()] for precision in EXACTNESS}
    measured["bf16x3"] += [rate / 3 for rate in measured["bfloat16"]]
    return {precision: max(rate for other in EXACTNESS[: i + 1] for rate in measured[other]) for i, precision in enumerate(EXACTNESS)}
