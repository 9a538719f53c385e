"""The arena of a recorded step."""

from contextlib import nullcontext

import numpy as np
import pytest

from minivit import functional as F
from minivit import no_grad
from minivit.kernels.core import devices
from minivit.kernels.core.arrays import ALIGNMENT, GPU_ALIGNMENT, array_on
from minivit.runtime.plan import Plan
from minivit.tensor import Tensor


@pytest.mark.parametrize("device, alignment", [("cpu", ALIGNMENT), ("cuda", GPU_ALIGNMENT)])
def test_arrays_of_any_size_are_aligned_in_the_arena(request, device, alignment):
    with devices.using(request.getfixturevalue("cuda_runtime")) if device == "cuda" else nullcontext(), no_grad():
        inputs = [Tensor(array_on(device, np.ones((1, n), np.float32))) for n in (1, 7, 17, 33, 65, 129, 500)]
        plan = Plan(lambda: tuple(F.relu(x).data for x in inputs), device=device)
        arena = plan._keep[1][0]
        offsets = sorted(devices.address_of(a) - devices.address_of(arena) for a in plan.results)
    assert len(set(offsets)) == len(inputs) and all(offset % alignment == 0 for offset in offsets)
