"""The layers, under the name by which users import them; they are defined in `nn/layers.py`."""

from .nn.layers import *  # noqa: F403
from .nn.layers import __all__ as __all__
