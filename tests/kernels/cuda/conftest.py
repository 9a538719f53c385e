"""For all tests of CUDA."""

import pytest

from minivit.kernels.core import devices


@pytest.fixture
def on_cuda(cuda_runtime):
    with devices.using(cuda_runtime):
        yield cuda_runtime
