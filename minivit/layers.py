"""The layers under their public import path; they are defined in `nn/layers.py`."""

from .nn.layers import *  # noqa: F403
from .nn.layers import __all__ as __all__
