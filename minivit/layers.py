"""The layers under their public import path; they are defined in `nn/layers.py` and `nn/convolution.py`."""

from .nn import convolution, layers
from .nn.convolution import *  # noqa: F403
from .nn.layers import *  # noqa: F403

__all__ = [*layers.__all__, *convolution.__all__]
