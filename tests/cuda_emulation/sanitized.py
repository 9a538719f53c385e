"""Every op's CUDA kernels under AddressSanitizer, which sees each access out of an array, or out of shared memory.

LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python tests/cuda_emulation/sanitized.py [OP...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cuda_emulation.emulator import Emulator, build  # noqa: E402
from cuda_emulation.listing import Listing  # noqa: E402
from minivit.kernels import OPS  # noqa: E402
from minivit.kernels.core import devices  # noqa: E402
from minivit.kernels.core.cases import Sample, make_inputs, shrunk  # noqa: E402


def calls(names: list[str]):
    for name in names or OPS:
        op = OPS[name]
        for case in op.cases[:2]:
            call = Sample(
                op, *make_inputs(op, shrunk(op, case, elements=20_000, operations=2_000_000), "bfloat16", np.random.default_rng(0))
            )
            yield call, call.weights(np.random.default_rng(1)), call.running(np.random.default_rng(2))


def main(names: list[str]) -> None:
    with devices.using(Listing()) as listing:
        for call, weights, running in calls(names):
            call.run("cuda", weights, running)
    build(listing.used, sanitize=True)
    with devices.using(Emulator(sanitize=True)):
        for call, weights, running in calls(names):
            call.run("cuda", weights, running)
    print(f"{len(listing.used)} kernels stayed within their arrays")


if __name__ == "__main__":
    main(sys.argv[1:])
