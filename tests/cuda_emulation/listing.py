"""Which kernels all ops and all models launch, in every dtype; and what NVIDIA's compiler makes of them, without a GPU.

python tests/cuda_emulation/listing.py              # registers and spills of every kernel, into benchmarks/results/cuda-registers.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cuda_emulation.emulator import Calls, Emulator  # noqa: E402
from minivit import Predictor, Trainer, create_model, list_models  # noqa: E402
from minivit.kernels import OPS  # noqa: E402
from minivit.kernels.core import devices  # noqa: E402
from minivit.kernels.core.cases import Sample, make_inputs  # noqa: E402
from minivit.kernels.cuda import kernel as cuda  # noqa: E402
from minivit.kernels.cuda import nvrtc  # noqa: E402
from minivit.models import PRESETS  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
DTYPES = ("float32", "float64", "bfloat16")
SHALLOW = {"crossvit": {"depths": (1, 1), "stages": 1}, "deepvit": {"depth": 1, "reattention_blocks": None}}  # by family; else depth 1


class Listing(Emulator):
    """Runs nothing: notes kernels. Its arrays hold no values."""

    def empty(self, shape, dtype):
        return self.placeholder(shape, dtype)

    def address(self, array):
        return (id(array.memory) << 8) + array.offset

    def to_numpy(self, array):
        return np.zeros(array.shape, array.dtype)

    def from_numpy(self, array, values):
        pass

    def launch(self, kernel, grid, arguments):
        self.used.add(kernel)

    def prepare(self, calls):
        return Calls(self, list(calls))

    def multiply(self, product, arguments):
        pass


class Zeros:
    """A generator of random numbers, but what is normal is 0, for it takes no time."""

    def __init__(self) -> None:
        self.others = np.random.default_rng(0)

    def standard_normal(self, shape):
        return np.zeros(shape)

    def __getattr__(self, name):
        return getattr(self.others, name)


@cache
def kernels_of_ops() -> set[cuda.Kernel]:
    with devices.using(Listing()):
        for op in OPS.values():
            for case in op.cases:
                for dtype in DTYPES:
                    call = Sample(op, *make_inputs(op, case, dtype, Zeros()))
                    call.run("cuda", call.weights(Zeros()))
        return devices.runtime().used


def kernels_of_models() -> set[cuda.Kernel]:
    """Of a training step and of inference, in the precisions that a GPU has."""
    with devices.using(Listing()):
        for name in list_models():
            for precision in ("float32", "bfloat16"):
                # Whose kernels are those of any depth and weights.
                model = create_model(name, init="zeros", **SHALLOW.get(PRESETS[name].family, {"depth": 1}))
                config = model.config
                images = np.zeros((2, config.in_channels, config.image_size, config.image_size), np.float32)
                Predictor(model, precision, "cuda").logits(images)
                Trainer(model, precision=precision, device="cuda", ema=0.9).step(images, np.zeros(2, np.int64))
        return devices.runtime().used


def usage(kernels: set[cuda.Kernel], architecture: str) -> dict[cuda.Kernel, nvrtc.Usage]:
    """What each takes; raises `DeviceError` where one does not compile."""
    by_source: dict[str, list[cuda.Kernel]] = defaultdict(list)
    for kernel in sorted(kernels):
        by_source[kernel.source].append(kernel)

    def compiled(source: str) -> dict[cuda.Kernel, nvrtc.Usage]:
        binaries = nvrtc.compile_kernels(source, by_source[source], architecture)
        found = nvrtc.usage(binaries[:1])
        return {kernel: found[binary.name] for kernel, binary in zip(by_source[source], binaries)}

    with ThreadPoolExecutor() as pool:
        return {kernel: used for part in pool.map(compiled, by_source) for kernel, used in part.items()}


def main() -> None:
    kernels = kernels_of_ops() | kernels_of_models()
    table = {
        architecture: {f"{kernel.source}: {kernel.expression}": used._asdict() for kernel, used in usage(kernels, architecture).items()}
        for architecture in ARCHITECTURES
    }
    path = ROOT / "benchmarks" / "results" / "cuda-registers.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    for architecture, rows in table.items():
        worst = sorted(rows.items(), key=lambda row: -row[1]["registers"])[:3]
        spilled = [name for name, used in rows.items() if used["spilled"]]
        print(f"{architecture}: {len(rows)} kernels; most registers: " + ", ".join(f"{n} {used['registers']}" for n, used in worst))
        for name in spilled:
            print(f"  spills {rows[name]['spilled']} bytes: {name}")


if __name__ == "__main__":
    main()
